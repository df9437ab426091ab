"""What a file format is: written from a drafter, read back, validated, and imported again."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.console import say
from export.base import THERE, Exporter, Precision, Reader
from export.tensors import load_tensors
from models.drafter.base import Drafter
from models.head.frozen import FrozenHead
from models.head.low_rank import LowRankHead
from models.head.own import OwnHead
from models.target import PACKAGE_PREFIX, Target


class Format(ABC):
    """One spelling of one family's weights."""

    name: ClassVar[str]
    families: ClassVar[tuple[type[Drafter], ...]]
    writes_text: ClassVar[bool] = False
    """Whether the folder is a language model of its own, which transformers loads."""
    all_depths: ClassVar[bool] = False
    """Whether engines always draft with every depth there is."""

    def complaint(self, drafter: Drafter) -> str | None:
        """A full sentence on what of this drafter the format cannot express; None when all."""
        return None

    def as_written(self, drafter: Drafter) -> Drafter:
        """The drafter that the file holds, where that is not the trained one."""
        return drafter

    @abstractmethod
    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        """Write into an existing empty folder; `complaint` was asked before."""

    @abstractmethod
    def read(self, folder: Path, target: Target) -> Reader:
        """Open what `write` wrote, sharing no code with it."""

    def compare(
        self, folder: Path, *, drafter: Drafter, target: Target, texts: Sequence[Tensor]
    ) -> dict[str, float]:
        """What is proven beside equal drafts, as `Exporter.compare`."""
        return {}

    @abstractmethod
    def is_mine(self, folder: Path) -> bool:
        """Whether config.json is in this format, whoever wrote it."""

    @abstractmethod
    def problems(self, folder: Path) -> list[str]:
        """What an engine would drop, refuse or misread in this folder; one clause each."""

    def load(self, folder: Path, target: Target) -> Drafter:
        """A drafter of ours with the folder's weights, bound to `target`."""
        raise ValueError(
            f"'{folder}' is in the '{self.name}' format, which there is no way back from; give a "
            "checkpoint of EAGLE, EAGLE-3 (native or speculators), Medusa, Hydra, Kangaroo or a "
            "small language model."
        )


class FormatExporter(Exporter):
    """An engine that takes several formats, one for each family it serves.

    `gamma` is the number of drafts a round that the serve command asks for, where a family sets
    none.
    """

    forms: tuple[Format, ...]
    cannot: ClassVar[str]
    """Why other families have no place there; a clause that follows a colon."""

    def __init__(self, *, gamma: int = 3, dtype: Precision | None = None) -> None:
        super().__init__(dtype=dtype)
        if gamma < 1:
            raise ValueError(
                f"exporter.gamma={gamma} drafts a round were asked for, expected 1 or more, "
                "because the serve command names it; give the gamma that `python -m decode` found "
                "best."
            )
        self.gamma = gamma
        self.used: Format | None = None

    def form(self, drafter: Drafter) -> Format | None:
        """The format of this family; None when the engine cannot serve it."""
        for form in self.forms:
            if type(drafter) in form.families:
                return form
        return None

    def cast(self, drafter: Drafter) -> Drafter:
        form = self.form(drafter)
        drafter = super().cast(drafter)
        return drafter if form is None or form.complaint(drafter) else form.as_written(drafter)

    def refuse(self, drafter: Drafter) -> None:
        form = self.form(drafter)
        if form is None:
            raise ValueError(f"{self.engine} cannot serve {type(drafter).__name__}: {self.cannot}.")
        complaint = form.complaint(drafter)
        if complaint is not None:
            raise ValueError(complaint)

    def write(self, drafter: Drafter, folder: Path, *, texts: Sequence[Tensor] = ()) -> None:
        self.refuse(drafter)
        form = self.form(drafter)
        assert form is not None
        form.write(drafter, folder, texts)
        self.used, self.writes_text = form, form.writes_text
        self.library = "transformers" if form.writes_text else "draftsmith"
        if drafter.acceptance is not None:
            say("The acceptance head stays behind: this format has no place for it.")

    def read(self, folder: Path, target: Target) -> Reader:
        form = next(form for form in self.forms if form.is_mine(folder))
        return form.read(folder, target)

    def compare(
        self, folder: Path, *, drafter: Drafter, target: Target, texts: Sequence[Tensor]
    ) -> dict[str, float]:
        form = self.form(drafter)
        assert form is not None
        return form.compare(folder, drafter=drafter, target=target, texts=texts)

    def chain_length(self, drafter: Drafter) -> int:
        form = self.form(drafter)
        return drafter.num_depths if form is not None and form.all_depths else self.gamma

    def usage(self, *, target: str, depths: int) -> str:
        assert self.used is not None, "write comes first"
        drafts = depths if self.used.all_depths else self.gamma
        return self.serving(self.used, target=served_name(target), drafts=drafts)

    @abstractmethod
    def serving(self, form: Format, *, target: str, drafts: int) -> str:
        """Markdown with the serve command for a folder in this format."""


def served_name(target: str) -> str:
    """The target as a serve command names it."""
    return THERE if target.startswith(PACKAGE_PREFIX) else target


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder."""
    return json.loads((folder / "config.json").read_text())


def write_files(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """config.json and model.safetensors; floats in `dtype`, integers and booleans as they are."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(plain(tensors, dtype), str(folder / "model.safetensors"), metadata={"format": "pt"})


def plain(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as a file holds them."""
    return {
        name: (t.to(dtype) if t.is_floating_point() else t).detach().cpu().contiguous().clone()
        for name, t in tensors.items()
    }


def floats(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of a checkpoint, floats in fp32."""
    loaded = {name: t.to(device) for name, t in load_tensors(folder).items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in loaded.items()}


def head_complaint(drafter: Drafter) -> str | None:
    """Why the vocabulary head is no plain matrix."""
    head = drafter.head(0)
    if isinstance(head, OwnHead) and head.linear.bias is not None:
        return (
            "This drafter's vocabulary head has a bias and this format has none; train with "
            "drafter.head.bias=false."
        )
    if isinstance(head, FrozenHead) and head.matrix() is None:
        return (
            "The target caps its logits and this format has no such cap; train with "
            "head@drafter.head=own."
        )
    if not isinstance(head, (OwnHead, FrozenHead, LowRankHead)):
        return (
            f"This format's vocabulary head is one matrix, and this drafter has a "
            f"{type(head).__name__}; train with head@drafter.head=own or =frozen."
        )
    return None


def head_rows(drafter: Drafter, depth: int = 0) -> Tensor:
    """The vocabulary head of a depth as one matrix `[D, d]`: its own, the target's rows, or the
    product of two thin ones."""
    head = drafter.head(depth)
    if isinstance(head, LowRankHead):
        return (head.up.weight.float() @ head.down.weight.float()).to(head.up.weight.dtype)
    matrix = head.matrix()
    assert matrix is not None
    return matrix[0]


def embedding_complaint(target: Target) -> str | None:
    """Why an engine that gives the drafter the target's embedding rows gives it other vectors."""
    ids = torch.arange(min(8, target.vocab_size), device=target.device)
    if torch.allclose(target.embed(ids).float(), target.embedding_weight_Vd[ids].float()):
        return None
    return (
        f"The target '{target.name}' scales its token embeddings, and engines give a drafter of "
        "this kind the unscaled rows."
    )


def whole_vocabulary(drafter: Drafter) -> Drafter:
    """A drafter with the target's frozen head, drafting over all tokens instead of some.

    Nothing of it depends on the vocabulary but the rows that are borrowed, so the weights are the
    same ones.
    """
    if drafter.draft_vocab_size is None:
        return drafter
    assert isinstance(drafter.head(0), FrozenHead)
    arguments: dict[str, Any] = dict(drafter._hub_mixin_config or {})  # type: ignore[call-overload]
    family: Any = type(drafter)
    whole: Any = family(**arguments | {"draft_vocab_size": None})
    weights = {k: v for k, v in drafter.state_dict().items() if k != "draft_ids_D"}
    whole.load_state_dict(weights)
    return whole.to(drafter.target.device, drafter.dtype).bind(drafter.target).eval()
