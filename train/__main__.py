"""Train a drafter.

python -m train +experiment=hydra_heads       a published recipe
python -m train resume=runs/hydra_heads/<id>  continue an interrupted run in its folder
"""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from conf.check import friendly_errors
from train.run import train

# A resumed run stays in its folder; any other gets the one named in conf/train.yaml.
OmegaConf.register_new_resolver("first_set", lambda first, second: first or second, replace=True)


@hydra.main(version_base=None, config_path="pkg://conf", config_name="train")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        train(cfg, Path(HydraConfig.get().runtime.output_dir))


def main() -> None:
    """Entry point of `draft-train`."""
    _command()


if __name__ == "__main__":
    main()
