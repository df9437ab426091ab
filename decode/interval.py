"""Ratios of sums over prompts, with their intervals; and the sums that reports share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

RESAMPLES = 2000
R = TypeVar("R")
Parts = Callable[[R], tuple[float, ...]]


class Counts(Protocol):
    """What one prompt gave. Counts of a real decoder are whole numbers, expected ones are not."""

    @property
    def category(self) -> str | None: ...
    @property
    def rounds(self) -> float: ...
    @property
    def produced(self) -> float: ...
    @property
    def tested_by_depth(self) -> Sequence[float]: ...
    @property
    def accepted_by_depth(self) -> Sequence[float]: ...


C = TypeVar("C", bound=Counts)


@dataclass(frozen=True)
class Estimate:
    """A ratio with its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def divided_by(self, number: float) -> "Estimate":
        """The estimate in another unit."""
        return Estimate(self.value / number, self.low / number, self.high / number)


def bootstrap(records: Sequence[R], parts: Parts[R]) -> Estimate:
    """A ratio of sums over prompts, and the interval from prompts drawn again with replacement.

    `parts` gives (a, b) for sum(a) / sum(b), or (a, b, c, d) for (sum a / sum b) / (sum c / sum d).
    """
    table_PC = np.array([parts(r) for r in records], dtype=np.float64)
    draws_RP = np.random.default_rng(0).integers(len(records), size=(RESAMPLES, len(records)))
    ratios_R = _divide(table_PC[draws_RP].sum(axis=1))
    low, high = np.quantile(ratios_R, [0.025, 0.975])
    return Estimate(ratio(records, parts), float(low), float(high))


def paired_difference(
    these: Mapping[str, tuple[float, float]], those: Mapping[str, tuple[float, float]]
) -> Estimate:
    """Ratio of `these` less ratio of `those`, both measured on the same prompts.

    Each gives (a, b) by prompt, for sum(a) / sum(b). Prompts are drawn again for both at once: what
    makes a prompt easy or hard is the same for both and drops out, so that the interval is far
    narrower than those of the two ratios. One that leaves out 0 is a difference that other prompts
    of this kind would show too.
    """
    if these.keys() != those.keys():
        raise ValueError("a paired difference needs the same prompts on both sides")
    table_P4 = np.array([(*these[key], *those[key]) for key in these], dtype=np.float64)
    draws_RP = np.random.default_rng(0).integers(len(table_P4), size=(RESAMPLES, len(table_P4)))

    def less(sums_R4: np.ndarray) -> np.ndarray:
        return _divide(sums_R4[:, :2]) - _divide(sums_R4[:, 2:])

    low, high = np.quantile(less(table_P4[draws_RP].sum(axis=1)), [0.025, 0.975])
    return Estimate(float(less(table_P4.sum(axis=0)[None])[0]), float(low), float(high))


def ratio(records: Sequence[R], parts: Parts[R]) -> float:
    """The ratio alone."""
    total_C = np.array([parts(r) for r in records], dtype=np.float64).sum(axis=0)
    return float(_divide(total_C[None])[0])


def _divide(sums_RC: np.ndarray) -> np.ndarray:
    # A prompt answered by its first token alone has no rounds; max(1) keeps such a resample finite.
    ratio_R = sums_RC[:, 0] / np.where(sums_RC[:, 1] > 0, sums_RC[:, 1], 1.0)
    if sums_RC.shape[1] == 4:
        ratio_R = ratio_R / (sums_RC[:, 2] / sums_RC[:, 3])
    return ratio_R


def tau_parts(r: Counts) -> tuple[float, ...]:
    """Tokens per step: tokens produced, and the target forwards (rounds) that made them."""
    return r.produced, r.rounds


def tau_by_category(records: Sequence[C]) -> dict[str, Estimate]:
    """tau of each category, best first; empty when there is only one."""
    groups: dict[str, list[C]] = {}
    for record in records:
        if record.category:
            groups.setdefault(record.category, []).append(record)
    if len(groups) < 2:
        return {}
    found = {name: bootstrap(group, tau_parts) for name, group in groups.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def sum_by_depth(lists: Sequence[Sequence[float]]) -> list[float]:
    """Element-wise sum of lists of different lengths."""
    deepest = max(len(one) for one in lists)
    return [sum(one[k] for one in lists if k < len(one)) for k in range(deepest)]
