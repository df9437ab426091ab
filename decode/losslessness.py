"""Is greedy decoding with the drafter the target's own greedy decoding, token for token?

Shape legend: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from decode.prompts import Prompt
from models.target import Target


@dataclass(frozen=True)
class Difference:
    """The first place where two answers part.

    `position` counts new tokens from 0. `gap` is the distance of the target's two best logits
    there, read in one fresh forward over the whole text; `step` is the spacing of the target's
    number format at the best logit. A gap of a few steps is a tie that another order of summation
    decides otherwise; a wide gap is a bug. `plain_rank` and `drafted_rank` say where the two tokens
    stand in the target's order (0 and 1 for a near tie).
    """

    id: str
    position: int
    plain_token: int
    drafted_token: int
    plain_rank: int
    drafted_rank: int
    gap: float
    step: float


@dataclass(frozen=True)
class Comparison:
    """How many of the prompts got identical answers, and where the others part."""

    prompts: int
    identical: int
    tokens: int
    dtype: str
    differences: list[Difference]

    def sentence(self) -> str:
        """The result in words."""
        text = (
            f"{self.identical} of {self.prompts} greedy answers ({self.tokens} tokens, "
            f"{self.dtype}) are identical with and without the drafter"
        )
        if not self.differences:
            return text + "."
        widest = max(self.differences, key=lambda d: d.gap / d.step)
        return (
            f"{text}; where the others first differ, the target's two best logits are at most "
            f"{widest.gap:.3g} apart ({widest.gap / widest.step:.1f} steps of {self.dtype})."
        )


def compare(target: Target, answers: Sequence[tuple[Prompt, list[int], list[int]]]) -> Comparison:
    """Compare greedy answers with (second) and without (third) a drafter, token by token.

    In fp32 they agree in practice. In bf16 a forward over several tokens rounds differently from
    forwards over one, and near ties may fall the other way: hence the gaps.
    """
    differences = [
        first_difference(target, prompt, drafted, plain)
        for prompt, drafted, plain in answers
        if drafted != plain
    ]
    return Comparison(
        prompts=len(answers),
        identical=len(answers) - len(differences),
        tokens=sum(len(plain) for _, _, plain in answers),
        dtype=str(target.dtype).removeprefix("torch."),
        differences=differences,
    )


@torch.inference_mode()
def first_difference(
    target: Target, prompt: Prompt, drafted: list[int], plain: list[int]
) -> Difference:
    """Where two greedy answers part, and how close the target's choice was there."""
    pairs = enumerate(zip(drafted, plain, strict=False))
    position = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    assert position is not None, "one greedy answer is a proper prefix of the other"
    text_BT = torch.tensor([prompt.tokens + plain[:position]], device=target.device)
    logits_V = target.project(target.forward(text_BT).final_BTd[0, -1])
    best_2 = logits_V.float().topk(2).values
    mantissa = torch.finfo(logits_V.dtype).eps
    exponent = torch.frexp(best_2[0].abs()).exponent - 1
    return Difference(
        id=prompt.id,
        position=position,
        plain_token=plain[position],
        drafted_token=drafted[position],
        plain_rank=int((logits_V > logits_V[plain[position]]).sum()),
        drafted_rank=int((logits_V > logits_V[drafted[position]]).sum()),
        gap=float(best_2[0] - best_2[1]),
        step=mantissa * 2.0 ** int(exponent),
    )
