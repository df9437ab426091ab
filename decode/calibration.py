"""Do the chances of an acceptance head mean what they say? And the numbers that make them.

With c_j the head's chance of draft j, the claim about a draft of k + 1 tokens is that it survives
whole with S_k = c_0 ... c_k. Each depth gets a temperature and a shift, c_k = sigmoid(l_k / T_k +
b_k), chosen one depth after another from the front to make

    - mean [ s_k log S_k + (1 - s_k) log(1 - S_k) ],    s_k = 1 when the draft survived depth k

least: a proper score, so it is least where S_k is the share of drafts that survive.

Expected calibration error: chances in BINS bins of equal width,

    ECE = sum over bins of (share of all rows) |mean chance - share that came true|

of tokens (those put to the test, one by one) and of survival (whole drafts, at every depth). A
token's truth is the chance it really had, min(1, p/q), instead of the coin that was thrown with it:
the same in the mean, with less noise, of which an error made of absolute values has too much.

Shape legend: I positions, K depths, M chances.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from decode.plot import BLUE, GREY, INK, LINE, QUIET, TEAL, style
from decode.trace import SIGNALS, Trace
from models.acceptance import AcceptanceHead

BINS = 10
FEWEST = 25
JUDGED, TRUTH = SIGNALS.index("judged"), SIGNALS.index("truth")
TINY = 1e-7


@dataclass(frozen=True)
class Judgements:
    """What a head said of drafts, and what became of them.

    `logits_IK` belongs to the draft at depth k (0-based) of the round at position i, and so does
    `truth_IK`, the chance it had (where it was tested). `tested_I` and `accepted_I` are those of
    decode/trace.py.
    """

    logits_IK: np.ndarray
    truth_IK: np.ndarray
    tested_I: np.ndarray
    accepted_I: np.ndarray

    @staticmethod
    def of(trace: Trace, prompts: Sequence[int] | None = None) -> "Judgements":
        """Of all answers, or of those with these numbers. A head that reads candidates says of
        depth k what it knows at row k + 1."""
        chosen = range(len(trace.walked)) if prompts is None else prompts
        walked = [trace.walked[i] for i in chosen if len(trace.walked[i].starts_I)]
        signals_IKS = np.concatenate([w.signals_IKS for w in walked])
        return Judgements(
            signals_IKS[:, trace.lag :, JUDGED],
            signals_IKS[:, : signals_IKS.shape[1] - trace.lag, TRUTH],
            np.concatenate([w.tested_I for w in walked]),
            np.concatenate([w.accepted_I for w in walked]),
        )

    @property
    def depths(self) -> int:
        return self.logits_IK.shape[1]

    def survived(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(s_k, known) of every position. It is not known where the text ended while all drafts
        were still right."""
        known_I = (self.tested_I > k) | (self.accepted_I < self.tested_I)
        return self.accepted_I > k, known_I

    def chances(self, fit: "Fit") -> np.ndarray:
        """c_k, `[I, K]`."""
        T_K = np.array([fit.scale[min(k, len(fit.scale) - 1)] for k in range(self.depths)])
        b_K = np.array([fit.shift[min(k, len(fit.shift) - 1)] for k in range(self.depths)])
        return 1.0 / (1.0 + np.exp(-self.logits_IK / T_K - b_K))


@dataclass(frozen=True)
class Fit:
    """T_k and b_k of every depth; the last ones serve deeper ones."""

    scale: list[float]
    shift: list[float]


PLAIN = Fit([1.0], [0.0])
"""As trained."""


@dataclass(frozen=True)
class Reliability:
    """Mean chance, share that came true and share of all rows, of each bin that has rows."""

    chance: list[float]
    truth: list[float]
    weight: list[float]

    @property
    def error(self) -> float:
        """The expected calibration error."""
        rows = zip(self.chance, self.truth, self.weight, strict=True)
        return sum(weight * abs(chance - truth) for chance, truth, weight in rows)


def reliability(chance_M: np.ndarray, true_M: np.ndarray) -> Reliability:
    """Bins of equal width; 1.0 belongs to the last."""
    bin_M = np.minimum((chance_M * BINS).astype(int), BINS - 1)
    filled = [b for b in range(BINS) if (bin_M == b).any()]
    return Reliability(
        [float(chance_M[bin_M == b].mean()) for b in filled],
        [float(true_M[bin_M == b].mean()) for b in filled],
        [float((bin_M == b).mean()) for b in filled],
    )


def token_reliability(j: Judgements, fit: Fit) -> Reliability:
    """Of drafts that were put to the test."""
    depth_K = np.arange(j.depths)
    tested_IK = depth_K < j.tested_I[:, None]
    return reliability(j.chances(fit)[tested_IK], j.truth_IK[tested_IK])


def survival_reliability(j: Judgements, fit: Fit) -> Reliability:
    """Of whole drafts, every length."""
    S_IK = j.chances(fit).cumprod(axis=1)
    pairs = [j.survived(k) for k in range(j.depths)]
    known_IK = np.stack([known for _, known in pairs], axis=1)
    true_IK = np.stack([survived for survived, _ in pairs], axis=1)
    return reliability(S_IK[known_IK], true_IK[known_IK])


def fit_chances(j: Judgements) -> Fit:
    """T_k and b_k of every depth, from the front. A depth that fewer than FEWEST drafts survived
    keeps those before: numbers fitted on a handful mean nothing."""
    scale: list[float] = []
    shift: list[float] = []
    before_I = np.ones(len(j.logits_IK))
    for k in range(j.depths):
        survived_I, known_I = j.survived(k)
        logits_I = j.logits_IK[:, k]
        if survived_I[known_I].sum() >= FEWEST:
            T, b = _best(logits_I[known_I], before_I[known_I], survived_I[known_I])
        else:
            T, b = (scale[-1], shift[-1]) if scale else (1.0, 0.0)
        scale.append(T)
        shift.append(b)
        before_I = before_I / (1.0 + np.exp(-logits_I / T - b))
    return Fit(scale, shift)


def _best(
    logits_I: np.ndarray, before_I: np.ndarray, survived_I: np.ndarray
) -> tuple[float, float]:
    """Temperature and shift with the least cross-entropy: a grid over the logarithm of one and over
    the other, then finer ones."""

    def loss(at: tuple[float, float]) -> float:
        log_t, b = at
        S_I = before_I / (1.0 + np.exp(-logits_I / np.exp(log_t) - b))
        S_I = np.clip(S_I, TINY, 1.0 - TINY)
        return -float(np.where(survived_I, np.log(S_I), np.log(1.0 - S_I)).mean())

    (log_t, b), width = (0.0, 0.0), 2.0
    for _ in range(4):
        grid = [
            (t, s)
            for t in np.linspace(log_t - width, log_t + width, 17)
            for s in np.linspace(b - width, b + width, 17)
        ]
        log_t, b = min(grid, key=loss)
        width /= 6.0
    return float(np.exp(log_t)), float(b)


@dataclass(frozen=True)
class Calibration:
    """Calibration errors before (as trained) and after, on prompts that fitted nothing."""

    prompts_fitted: int
    prompts_measured: int
    drafts: int
    scale: list[float]
    shift: list[float]
    token_before: Reliability
    token_after: Reliability
    survival_before: Reliability
    survival_after: Reliability

    def numbers(self) -> dict[str, Any]:
        """For config.json and results.json."""
        return {
            "prompts_fitted": self.prompts_fitted,
            "prompts_measured": self.prompts_measured,
            "drafts": self.drafts,
            "token_ece": [self.token_before.error, self.token_after.error],
            "survival_ece": [self.survival_before.error, self.survival_after.error],
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, bins included."""
        return asdict(self) | self.numbers()

    def sentence(self) -> str:
        """The result in words."""
        return (
            f"Acceptance head: expected calibration error {self.token_before.error:.2%} -> "
            f"{self.token_after.error:.2%} (tokens), {self.survival_before.error:.2%} -> "
            f"{self.survival_after.error:.2%} (survival of whole drafts) with a temperature and "
            f"a shift for each depth, on {self.prompts_measured} prompts that fitted nothing "
            f"({self.drafts:,} drafts)."
        )


def calibrate(head: AcceptanceHead, trace: Trace) -> Calibration:
    """Fit every T_k and b_k on the odd prompts of a trace, measure on the even ones, and note both
    in the head."""
    count = len(trace.walked)
    if count < 2:
        raise ValueError(
            f"{count} prompts are there to calibrate an acceptance head with, expected 2 or more, "
            "because its error is measured on others than it is fitted on; hold out more prompts "
            "(dataset.holdout)."
        )
    fitted = Judgements.of(trace, range(1, count, 2))
    fit = fit_chances(fitted)
    head.scale, head.shift = fit.scale, fit.shift
    found = measured(head, Judgements.of(trace, range(0, count, 2)), count // 2, -(-count // 2))
    head.calibration = found.numbers()
    return found


def measured(head: AcceptanceHead, j: Judgements, fitted: int, prompts: int) -> Calibration:
    """How well a head's chances hold on these drafts, as fitted and as trained."""
    fit = Fit(head.scale, head.shift)
    return Calibration(
        prompts_fitted=fitted,
        prompts_measured=prompts,
        drafts=len(j.tested_I),
        scale=head.scale,
        shift=head.shift,
        token_before=token_reliability(j, PLAIN),
        token_after=token_reliability(j, fit),
        survival_before=survival_reliability(j, PLAIN),
        survival_after=survival_reliability(j, fit),
    )


def reliability_plot(c: Calibration, file: Path, *, caption: str) -> None:
    """The reliability diagram: tokens on the left, whole drafts on the right."""
    figure = Figure(figsize=(11.5, 5.4), facecolor="white")
    FigureCanvasAgg(figure)
    headline = (
        f"Calibration error {c.token_after.error:.1%} of tokens, {c.survival_after.error:.1%} of "
        "whole drafts"
    )
    figure.text(0.03, 0.945, headline, fontsize=18, weight="bold", color=INK, va="center")
    figure.text(0.03, 0.885, caption, fontsize=10, color=QUIET, va="center")
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.065, right=0.97, top=0.74, bottom=0.11, wspace=0.18)
    _panel(left, "A drafted token is accepted", c.token_before, c.token_after)
    _panel(right, "A whole draft survives", c.survival_before, c.survival_after)
    figure.savefig(file, dpi=160)


def _panel(axes: Axes, title: str, before: Reliability, after: Reliability) -> None:
    style(axes, title, "share that came true, over the chance that was given")
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    axes.bar(
        after.chance, after.weight, width=0.05, color=GREY, alpha=0.5, label="share of all drafts"
    )
    for found, color, label in ((before, TEAL, "as trained"), (after, BLUE, "fitted by depth")):
        axes.plot(
            found.chance,
            found.truth,
            "o-",
            color=color,
            linewidth=2,
            markersize=5.5,
            label=f"{label}: error {found.error:.1%}",
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper left")
