"""Drafters as a GGUF file: EAGLE-3, or a small language model.

The folder holds drafter.gguf: the weights under llama.cpp's names (export/formats/gguf_file.py) and
the target's tokenizer, without which llama.cpp refuses the pair
(export/formats/gguf_tokenizer.py). Of the target's weights there are only those that a small
language model borrows. The proof reads the file back with the `gguf` package and a forward of its
own (export/formats/gguf_reader.py).
"""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFReader
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from export.base import Reader
from export.formats import gguf_check
from export.formats.base import Format
from export.formats.eagle3 import Eagle3Format, native_config, native_tensors
from export.formats.gguf_file import (
    KINDS,
    Tokenizer,
    refuse_architecture,
    rotation_factors,
    round_matrices,
    write_eagle3,
    write_language_model,
)
from export.formats.gguf_reader import GgufEagle3, GgufModel
from export.formats.gguf_tokenizer import copy_tokenizer, write_tokenizer
from export.formats.language_model import LanguageModel
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.eagle3 import Eagle3
from models.drafter.sorted_lm import SortedLm
from models.head.own import OwnHead
from models.packaged import packaged_gguf
from models.target import PACKAGE_PREFIX, Target

FILE = "drafter.gguf"
Quantization = Literal["q8_0"]


class GgufFormat(Format):
    """Base of the two. `target_gguf` is the file whose tokenizer is copied; None finds one.
    `quantization` is how matrices are stored; None keeps the drafter's precision."""

    def __init__(
        self, *, target_gguf: str | None = None, quantization: Quantization | None = None
    ) -> None:
        self.target_gguf = target_gguf
        self.quantization: Quantization | None = quantization

    def settings(self, drafter: Drafter) -> dict[str, Any]:
        """What both writers are given."""
        dtype = str(drafter.dtype).removeprefix("torch.")
        assert dtype in KINDS, f"drafters are never {dtype}"
        return {
            "dtype": self.quantization or dtype,
            "tokenizer": tokenizer_of(drafter.target, drafter.vocab_size, self.target_gguf),
            "about": {
                "general.name": f"{type(drafter).__name__} drafter",
                "draftsmith.family": type(drafter).__name__,
                "draftsmith.target_fingerprint": drafter.target.fingerprint(),
            },
        }

    def as_written(self, drafter: Drafter) -> Drafter:
        if self.quantization is not None:
            drafter = drafter.float()
            round_matrices(drafter, self.quantization)
        return drafter

    def is_mine(self, folder: Path) -> bool:
        return gguf_check.is_mine(folder)

    def problems(self, folder: Path) -> list[str]:
        return gguf_check.problems(folder)

    def read(self, folder: Path, target: Target) -> Reader:
        file = folder / FILE
        if GGUFReader(file).fields["general.architecture"].contents() == "eagle3":
            return GgufEagle3(file, target)
        return GgufModel(file, target.device)


class GgufEagle3Format(GgufFormat):
    """EAGLE-3."""

    name = "draft-eagle3"
    families = (Eagle3,)

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, Eagle3)
        if drafter.norm_output:
            return (
                "This drafter feeds back its normed output and llama.cpp feeds back the state "
                "before the norm; train with drafter.norm_output=false."
            )
        if self.quantization is not None and not isinstance(drafter.head(0), OwnHead):
            return (
                f"exporter.quantization={self.quantization} was asked for and this drafter has a "
                f"{type(drafter.head(0)).__name__}, whose rows are not its own or not one matrix; "
                "leave it null, or train with head@drafter.head=own."
            )
        return Eagle3Format().complaint(drafter) or _refusal(
            rotation_factors, drafter.layer.self_attn.config
        )

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        assert isinstance(drafter, Eagle3)
        write_eagle3(
            folder / FILE,
            config=native_config(drafter),
            weights=native_tensors(drafter, "midlayer"),
            **self.settings(drafter),
        )


class GgufLanguageModel(GgufFormat):
    """A small language model, written as export/assistant.py has it."""

    name = "draft-simple"
    families = (CausalLm, SortedLm)

    def complaint(self, drafter: Drafter) -> str | None:
        assert isinstance(drafter, CausalLm)
        if self.quantization is not None:
            return (
                f"exporter.quantization={self.quantization} was asked for, which is written for "
                "EAGLE-3 only: most of a small language model is the target's embedding and head. "
                "Leave it null; llama.cpp's own `llama-quantize` makes smaller files of it."
            )
        plain = LanguageModel().complaint(drafter)
        return plain or _refusal(refuse_architecture, drafter.inner.config)

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        with tempfile.TemporaryDirectory() as plain:
            LanguageModel().write(drafter, Path(plain), texts)
            write_language_model(
                folder / FILE,
                config=AutoConfig.from_pretrained(plain),
                weights=load_file(Path(plain) / "model.safetensors"),
                **self.settings(drafter),
            )


def tokenizer_of(target: Target, vocab_size: int, gguf: str | None = None) -> Tokenizer:
    """What writes the target's tokenizer, from the best source there is."""
    if gguf is not None:
        return partial(copy_tokenizer, gguf=Path(gguf), vocab_size=vocab_size)
    if target.name.startswith(PACKAGE_PREFIX):
        packaged = packaged_gguf(target.name.removeprefix(PACKAGE_PREFIX))
        return partial(copy_tokenizer, gguf=packaged, vocab_size=vocab_size)
    return partial(write_tokenizer, tokenizer=target.tokenizer, vocab_size=vocab_size)


def _refusal(ask: Any, config: Any) -> str | None:
    """The sentence with which something is refused."""
    try:
        ask(config)
    except ValueError as error:
        return str(error)
    return None
