"""The root keys of each command's config.

One small dataclass a command, first entry of its primary config's defaults, so that Hydra rejects
an unknown root key and a root scalar of the wrong type while composing. Groups are `Any`: what may
stand inside them is written once, in the signature of the class their `_target_` names, and
`conf.check` compares the two.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class TrainConfig:
    """`python -m train`"""

    name: str = MISSING
    seed: int = 0
    target: Any = MISSING
    dataset: Any = MISSING
    mix: Any = None
    drafter: Any = MISSING
    start: str | None = None
    vocab_from: str | None = None
    loss: Any = MISSING
    depth_decay: float = 1.0
    mask_lag: int = 0
    teacher: Any = MISSING
    onpolicy: Any = None
    weighting: Any = None
    acceptance: Any = None
    data: Any = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    trainer: Any = MISSING
    logger: Any = None
    callbacks: Any = None
    final_decode: Any = None
    resume: str | None = None


@dataclass
class DataPrepConfig:
    """`python -m data_prep`"""

    name: str = MISSING
    target: Any = MISSING
    dataset: Any = MISSING
    server: Any = None
    estimate: bool = False
    part: int | None = None
    parts: int = 1
    show: int = 0


@dataclass
class DecodeConfig:
    """`python -m decode`"""

    name: str = "decode"
    run: str = MISSING
    bench: Any = MISSING
    tree: Any = MISSING
    stop: Any = None
    verifier: Any = MISSING
    baselines: Any = None
    replay: Any = None
    tune: bool = False
    tuning: Any = MISSING
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    limit: int | None = None
    max_prompt_tokens: int | None = None
    seed: int = 0
    baseline: bool = True
    floor: float | None = None
    lossless: bool = False
    dtype: str | None = None


@dataclass
class ExportConfig:
    """`python -m export`"""

    name: str = "export"
    run: str | None = None
    exporter: Any = MISSING
    out: str | None = None
    check: str | None = None
    install: str | None = None
    texts: int = 8
    prove: bool = False
    engine: str | None = None
    bench: Any = MISSING
    prompts: int = 50
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 64
    dtype: str = "float32"
    timed: bool = False


@dataclass
class ImportDrafterConfig:
    """`python -m scripts.import_drafter`"""

    name: str = "import_drafter"
    checkpoint: str = MISSING
    target: Any = MISSING
    dataset: Any = MISSING
    out: str | None = None
    texts: int = 8


@dataclass
class OnlineConfig:
    """`python -m scripts.online`"""

    name: str = "online"
    run: str | None = None
    bench: Any = MISSING
    streams: Any = None
    tree: Any = MISSING
    verifier: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    out: str | None = None
    resume: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    limit: int | None = None
    max_prompt_tokens: int | None = None
    seed: int = 0
    dtype: str | None = None
    interval: int = 8
    window: int = 8
    z: float = 1.64
    background: bool = True
    frozen: bool = True
    updates: Any = MISSING


@dataclass
class StudyConfig:
    """`python -m scripts.study`"""

    name: str = "study"
    start: str = MISSING
    experiment: str = MISSING
    in_domain: Any = MISSING
    out_of_domain: Any = MISSING
    losses: list[str] = MISSING
    data: dict[str, list[str]] = MISSING
    overrides: list[str] = MISSING
    seed: int = 0
    jobs: int = 1
    threads: int = 1
    train: bool = True
    out: str | None = None
    heldout: str = MISSING
    temperatures: list[float] = MISSING
    gamma: int = 3
    gammas: list[int] = MISSING
    samples: int = 1
    limit: int | None = None
    max_new_tokens: int = 64
    max_prompt_tokens: int | None = None
    dtype: str | None = None


@dataclass
class FamiliesConfig:
    """`python -m scripts.families`"""

    name: str = "families"
    runs: list[str] = MISSING
    out: str = MISSING
    measure: bool = True
    beside: str | None = None
    benches: Any = MISSING
    shapes: Any = None
    baselines: Any = None
    gamma: int | None = None
    temperatures: list[float] = MISSING
    samples: int = 1
    limit: int | None = None
    max_new_tokens: int = 64
    max_prompt_tokens: int | None = None
    timed_prompts: int = 0
    seed: int = 0
    dtype: str | None = None


@dataclass
class TrimConfig:
    """`python -m scripts.trim`"""

    name: str = "trim"
    run: str = MISSING
    bench: Any = MISSING
    sizes: list[int] = MISSING
    data: list[str] = MISSING
    size: int | None = None
    gamma: int = 4
    limit: int | None = None
    max_new_tokens: int = 64
    max_prompt_tokens: int | None = None
    seed: int = 0
    dtype: str | None = None
    out: str | None = None


@dataclass
class ConsolidateConfig:
    """`python -m scripts.consolidate`"""

    name: str = "consolidate"
    run: str = MISSING
    checkpoint: str | None = None
    out: str | None = None


@dataclass
class CurvesConfig:
    """`python -m scripts.curves`"""

    name: str = "curves"
    runs: list[str] = MISSING
    output: str = MISSING
    numbers: list[str] = MISSING


@dataclass
class UploadConfig:
    """`python -m scripts.upload`"""

    name: str = "upload"
    run: str = MISSING
    repo: str = MISSING
    folder: str | None = None
    private: bool = True
    dry_run: bool = False
    license: str = "other"
    target_license: str = "unknown"
    data_license: str = "unknown"
    target_weights: bool = False


def register() -> None:
    """Make the schemas known to Hydra as `train_schema`, `data_prep_schema`, ..."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainConfig)
    store.store(name="data_prep_schema", node=DataPrepConfig)
    store.store(name="decode_schema", node=DecodeConfig)
    store.store(name="export_schema", node=ExportConfig)
    store.store(name="import_drafter_schema", node=ImportDrafterConfig)
    store.store(name="online_schema", node=OnlineConfig)
    store.store(name="study_schema", node=StudyConfig)
    store.store(name="trim_schema", node=TrimConfig)
    store.store(name="families_schema", node=FamiliesConfig)
    store.store(name="consolidate_schema", node=ConsolidateConfig)
    store.store(name="curves_schema", node=CurvesConfig)
    store.store(name="upload_schema", node=UploadConfig)


register()
