"""Prepare a dataset.

python -m data_prep dataset=quickstart                  prepare it, or continue
python -m data_prep dataset=quickstart estimate=true    tokens, disk and hours; writes nothing
python -m data_prep dataset=quickstart part=3 parts=16  one job's share of the answers
python -m data_prep dataset=quickstart show=5           samples coloured by the learn mask
python -m data_prep dataset=broad server=running 'server.urls=[http://localhost:8000/v1]'
                                                        servers of the target answer (server=vllm
                                                        starts one)
"""

import hydra
from omegaconf import DictConfig

from conf.check import build, check, friendly_errors
from conf.console import say
from data_prep.doctor import Doctor
from data_prep.manifest import SPLITS
from data_prep.pipeline import Dataset
from data_prep.server.base import Server
from models.device import keep_freed_memory
from models.target import Target


@hydra.main(version_base=None, config_path="pkg://conf", config_name="data_prep")
def main(cfg: DictConfig) -> None:
    """Check everything, then estimate, prepare or show."""
    with friendly_errors():
        check(cfg)
        server: Server | None = build(cfg.server)
        dataset: Dataset = build(cfg.dataset, server=server)
        target: Target = build(cfg.target)
        keep_freed_memory(target.device)
        if cfg.estimate:
            say(f"Dataset '{dataset.name}' with target '{target.name}' would take:")
            expected = dataset.estimate(target)
            expected.say()
            expected.refuse_without_room(dataset.folder)
            return
        if cfg.part is not None:
            dataset.prepare_part(target, part=cfg.part, parts=cfg.parts)
            return
        folder = dataset.prepare(target)
        if cfg.show:
            doctor = Doctor(target)
            for split in SPLITS:
                reader = folder.reader(split)
                doctor.examine([reader[i] for i in range(len(reader))], f"split {split}")
                doctor.show(reader, cfg.show)
            say("Learned tokens are green. No example has a wrong mask.")


if __name__ == "__main__":
    main()
