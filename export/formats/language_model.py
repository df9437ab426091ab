"""A drafter that is a language model: the plain folder of export/assistant.py, for any engine."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig

from export import assistant
from export.assistant import AssistantExporter
from export.base import Reader
from export.formats.base import Format
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.sorted_lm import SortedLm
from models.target import Target

OWN = {"_target_": "models.head.own.OwnHead"}
TIED = {"_target_": "models.head.tied.TiedHead"}


class LanguageModel(Format):
    """What transformers, vLLM, SGLang and TensorRT-LLM take as a draft model."""

    name = "assistant"
    families = (CausalLm, SortedLm)
    writes_text = True

    def __init__(self, *, gamma: int = 4) -> None:
        self.exporter = AssistantExporter(gamma=gamma)

    def complaint(self, drafter: Drafter) -> str | None:
        try:
            self.exporter.refuse(drafter)
        except ValueError as error:
            return str(error)
        return None

    def write(self, drafter: Drafter, folder: Path, texts: Sequence[Tensor]) -> None:
        self.exporter.write(drafter, folder, texts=texts)

    def read(self, folder: Path, target: Target) -> Reader:
        return self.exporter.read(folder, target)

    def compare(
        self, folder: Path, *, drafter: Drafter, target: Target, texts: Sequence[Tensor]
    ) -> dict[str, float]:
        return self.exporter.compare(folder, drafter=drafter, target=target, texts=texts)

    def load(self, folder: Path, target: Target) -> Drafter:
        """Any causal language model with the target's tokenizer."""
        tied = bool(AutoConfig.from_pretrained(folder).tie_word_embeddings)
        drafter = CausalLm(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            target_config=target.plain_config,
            init="source",
            source=str(folder),
            embedding="own",
            head=TIED if tied else OWN,
        )
        drafter.bind(target)
        drafter.init_from(target)
        return drafter.to(target.device).eval()

    def is_mine(self, folder: Path) -> bool:
        return assistant.is_mine(folder)

    def problems(self, folder: Path) -> list[str]:
        return assistant.problems(folder)
