"""A published checkpoint as a run folder of ours: to measure, to fine-tune, to export anew.

python -m scripts.import_drafter checkpoint=<folder or Hub id> target.name=<its target>
python -m decode run=runs/imported/<folder> bench=mt_bench
python -m train +experiment=eagle3 start=runs/imported/<folder>
python -m export run=runs/imported/<folder> exporter=vllm

Read are EAGLE and HASS, EAGLE-3 (native or of the speculators library), Medusa, Hydra, Kangaroo and
small language models, from safetensors or from a torch file (with weights_only). What is written
must draft what an independent reader of the checkpoint drafts, on validation texts where the
dataset is there and on a few sentences otherwise.
"""

import inspect
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import hydra
from huggingface_hub import snapshot_download
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from conf.check import RUNTIME_NAMES, build, check, friendly_errors
from conf.console import say
from data_prep.manifest import MANIFEST, dataset_hash, read_manifest
from data_prep.shards import ShardReader
from export.check import FORMATS, format_name
from export.formats.base import Format, read_config
from export.formats.language_model import LanguageModel
from export.hf import DrafterReader
from export.parity import Proof, prove_equal
from models.drafter.base import Drafter
from models.target import Target
from train.record import facts, write_config, write_json

FILES = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.jinja"]
SENTENCES = (
    "The capital of France is Paris, and the largest city on its southern coast is Marseille.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Speculative decoding lets a small model guess what a large one is about to say.",
)


def import_drafter(cfg: DictConfig) -> Path:
    """Read, prove and write one drafter; the run folder is complete when it appears."""
    check(cfg)
    checkpoint = fetch(cfg.checkpoint)
    form = find_format(checkpoint)
    out = Path(cfg.out) if cfg.out else Path("runs") / "imported" / Path(cfg.checkpoint).name
    if out.exists():
        raise ValueError(f"'{out}' exists already, and nothing is overwritten; give another out=.")
    node = cfg.target.copy()
    node.dtype = "float32"
    target: Target = build(node)
    drafter = form.load(checkpoint, target)
    stored = drafter.dtype
    proof = prove(form, checkpoint, drafter.float(), target, texts(cfg, target))
    say(
        f"{type(drafter).__name__} from the '{format_name(form)}' format: {proof.tokens} tokens in "
        f"{proof.chains} greedy chains over {proof.texts} texts, all as the checkpoint drafts them."
    )
    return write_run(cfg, out, drafter.to(stored), target, form)


def fetch(checkpoint: str) -> Path:
    """The folder itself, or that of a Hub id (owner/name): configuration and weights, no code."""
    folder = Path(checkpoint).expanduser()
    if folder.exists() or checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        return folder
    say(f"{checkpoint} is no folder here: fetching it from the Hub.")
    return Path(snapshot_download(checkpoint, allow_patterns=FILES))


def find_format(checkpoint: Path) -> Format:
    """How to read the folder. Raises ValueError when it is no drafter that we know."""
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"checkpoint={checkpoint} should be a folder with config.json and weights, as they are "
            "published; there is no config.json in it. Download the whole folder first."
        )
    if "_target_" in read_config(checkpoint):
        raise ValueError(
            f"checkpoint={checkpoint} is one of our own drafter folders, which needs no import: "
            "train begins with it by start=<folder>."
        )
    plain = LanguageModel()
    for form in FORMATS:
        if isinstance(form, Format) and form.is_mine(checkpoint):
            return form
    named = (read_config(checkpoint).get("architectures") or [""])[0]
    if named.endswith("ForCausalLM"):
        return plain
    raise ValueError(
        f"checkpoint={checkpoint} ({named or 'no architectures in its config.json'}) is no drafter "
        "that can be imported; expected EAGLE, EAGLE-3 (native or speculators), Medusa, Hydra, "
        "Kangaroo or a small language model."
    )


def texts(cfg: DictConfig, target: Target) -> list[Tensor]:
    """Held-out texts of the dataset, or a few sentences where it is not prepared."""
    folder = Path(cfg.dataset.root) / cfg.dataset.name
    if (folder / MANIFEST).is_file():
        reader = ShardReader(folder, "val")
        return [reader[i].tokens for i in range(min(cfg.texts, len(reader)))]
    made = [target.tokenizer(s, return_tensors="pt")["input_ids"][0] for s in SENTENCES]
    return made[: cfg.texts]


def prove(
    form: Format, checkpoint: Path, drafter: Drafter, target: Target, seen: list[Tensor]
) -> Proof:
    """What was read drafts what a reader of the checkpoint drafts."""
    return prove_equal(
        trained=form.read(checkpoint, target),
        exported=DrafterReader(drafter),
        drafter=drafter,
        target=target,
        texts=seen,
    )


def write_run(cfg: DictConfig, out: Path, drafter: Drafter, target: Target, form: Format) -> Path:
    """The run folder, as training leaves one."""
    folder = Path(cfg.dataset.root) / cfg.dataset.name
    known = (folder / MANIFEST).is_file()
    about = facts(
        target=target,
        drafter=drafter,
        dataset_hash=dataset_hash(read_manifest(folder)) if known else "not prepared",
        coverage=float("nan") if drafter.draft_vocab_size else 1.0,
    )
    about["command"] = ["python", "-m", "scripts.import_drafter", *sys.argv[1:]]
    about["drafter"]["coverage"] = None  # of what it was trained on, which is not known here
    about["imported"] = {"checkpoint": str(cfg.checkpoint), "format": format_name(form)}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".importing-"))
    try:
        drafter.save_pretrained(temporary / "drafter")
        named = f"{type(drafter).__module__}.{type(drafter).__qualname__}"
        arguments: dict[str, Any] = dict(drafter._hub_mixin_config or {})  # type: ignore[call-overload]
        own = {k: cfg[k] for k in ("name", "target", "dataset")}
        config = OmegaConf.create(own | {"drafter": {"_target_": named, **arguments}})
        write_config(temporary, config)
        write_json(temporary / "run.json", about)
        temporary.chmod(0o755)  # mkdtemp makes it private
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"Written: {out} (python -m decode run={out})")
    say(f"Training goes on from it with: {train_command(drafter, target, out)}")
    return out


def train_command(drafter: Drafter, target: Target, out: Path) -> str:
    """A training of the same drafter: what its YAML would set otherwise is overridden."""
    family = type(drafter).__module__.rpartition(".")[2]
    arguments: dict[str, Any] = dict(drafter._hub_mixin_config or {})  # type: ignore[call-overload]
    signature = inspect.signature(type(drafter)).parameters
    made = [f"drafter={family}"]
    head = str(arguments.pop("head")["_target_"]).split(".")[2]
    made.append(f"head@drafter.head={head}")
    if arguments.get("target_shape") not in (None, target.layer_shape):
        made.append(f"+drafter.target_shape={_short(arguments['target_shape'])}")
    for name, value in arguments.items():
        if name not in RUNTIME_NAMES and value != signature[name].default:
            made.append(f"drafter.{name}={_short(value)}")
    return shlex.join(["python", "-m", "train", f"start={out}", *made])


def _short(value: Any) -> str:
    """As an override writes it."""
    return json.dumps(value, separators=(",", ":")).replace('"', "")


@hydra.main(version_base=None, config_path="pkg://conf", config_name="import_drafter")
def _command(cfg: DictConfig) -> None:
    with friendly_errors():
        import_drafter(cfg)


def main() -> None:
    """The command."""
    _command()


if __name__ == "__main__":
    main()
