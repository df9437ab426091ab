"""The drafter writes: batches of prompts continued with the weights it has now.

Shape legend: D draft vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch

from conf.signature import locate
from data_prep.generate import Generator, Request
from models.drafter.base import Drafter
from models.target import Target
from train.interleaved import Interleaver
from train.ring import Sampled

Mode = Literal["draft", "interleaved"]


class Writer:
    """Continues prompts without dropout and without gradients, each by its own random numbers.

    In mode draft from q alone; interleaved, the target replaces tokens outside its `top_k` most
    likely. Under autocast the weights are cast once for all tokens.
    """

    def __init__(self, *, target: Target, mode: Mode, top_k: int, batch_tokens: int) -> None:
        self.target, self.mode = target, mode
        self.top_k, self.batch_tokens = top_k, batch_tokens
        self._judged = self._kept = 0

    def write(self, requests: Sequence[Request], drafter: Drafter) -> dict[str, Sampled]:
        """Prompt and continuation of each request, by its id."""
        if not requests:
            return {}
        check_drafter(drafter)
        with _eval_mode(drafter), _once_cast(drafter):
            speaker, ids_D = _speaker(drafter), drafter.draft_ids_D
            generator = Generator(
                target=speaker,
                batch_tokens=self.batch_tokens,
                max_batch=len(requests),
                ids_D=ids_D,
            )
            interleaver = None
            if self.mode == "interleaved":
                # A CPU pays for every token the target reads, an accelerator for every forward.
                block = 1 if self.target.device.type == "cpu" else 4
                interleaver = Interleaver(
                    drafter=speaker,
                    target=self.target,
                    top_k=self.top_k,
                    block=block,
                    ids_D=ids_D,
                )
            made: dict[str, Sampled] = {}
            for group in generator.batches(requests):
                answers = (interleaver or generator).answer_batch(group)
                for request, answer in zip(group, answers, strict=True):
                    tokens = torch.tensor(request.tokens + answer.tokens)
                    made[request.id] = Sampled(tokens, len(request.tokens))
        if interleaver is not None:
            self._judged += interleaver.proposed
            self._kept += interleaver.kept
        return made

    def take_counts(self) -> tuple[int, int]:
        """Tokens the target judged since the last call, and how many of them it kept."""
        counts = self._judged, self._kept
        self._judged = self._kept = 0
        return counts


def check_family(node: Any) -> None:
    """Refuse to sample from a drafter's config node whose class reads the target's features.

    Raises ValueError; nothing has to be loaded for it.
    """
    family = locate(str(node["_target_"]))
    # A family that decides by its settings has a property here; `check_drafter` sees its value.
    if getattr(family, "reads_features", False) is True:
        _refuse(getattr(family, "__name__", str(family)))


def check_drafter(drafter: Drafter) -> None:
    """The same for a drafter that exists."""
    if drafter.reads_features:
        _refuse(type(drafter).__name__)


def _refuse(family: str) -> None:
    raise ValueError(
        f"onpolicy is given, but {family} has reads_features = True: it drafts from the target's "
        "features and cannot write text alone, and on-policy training needs a drafter that can; "
        "use a drafter that reads tokens only (drafter=causal_lm), or leave on-policy training "
        "out with onpolicy=null."
    )


def _speaker(drafter: Drafter) -> Any:
    """The drafter in a target's place, drawing from its own vocabulary: the columns that can never
    be drawn would cost more than the model."""
    whole: Any = drafter.as_generator_target()  # type: ignore[attr-defined]
    return SimpleNamespace(
        forward=whole.forward,
        project=drafter.head(drafter.num_depths - 1),
        eos_ids=whole.eos_ids,
        device=whole.device,
    )


@contextmanager
def _once_cast(drafter: Drafter) -> Iterator[None]:
    """Weights in the dtype of autocast, where that is on: it casts at every token otherwise."""
    device = next(drafter.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    kept = [(p, p.data) for p in drafter.parameters() if p.dtype == torch.float32]
    try:
        for p, data in kept:
            p.data = data.to(dtype)
        yield
    finally:
        for p, data in kept:
            p.data = data


@contextmanager
def _eval_mode(drafter: Drafter) -> Iterator[None]:
    """Without dropout; every module gets back the mode it had."""
    modes = [(module, module.training) for module in drafter.modules()]
    drafter.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
