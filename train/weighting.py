"""Which rows of a batch count, and how much, decided by what the drafter does on them.

A weighting looks at the rows without gradients and returns the same depths with masks or weights.
(Weights that depend on the depth alone are `depth_decay`.)

A *block* is what a drafter predicts from one position t: the states with one index in all its
depths. Slots of a block that do not count in the loss (prompt tokens, padding, masks) are passed
over: they neither break a block nor get a weight.

Shape legend: B sequences, T positions, N states of a depth, M = B*N flat states, n rows of one
depth, K depths, D draft vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from models.drafter.base import Depth, Drafter
from models.drafter.load import load_drafter
from models.target import Features, Target
from train.lesson import Lesson, TargetProjection
from train.losses import CrossEntropy, ForwardKL, RowLoss, Rows
from train.walk import Walk


@dataclass(frozen=True)
class Situation:
    """One micro-batch, as a weighting sees it."""

    depths: Sequence[Depth]
    lesson: Lesson
    projection: TargetProjection
    chunk_rows: int
    features: Features
    tokens_BT: Tensor

    @torch.no_grad()
    def rows(
        self, depths: Sequence[Depth], loss: RowLoss, of: Callable[[Rows], Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """`(state_n, of(rows))` for each depth: a number for every row that counts.

        `loss` only says what the rows must hold (the target or not).
        """
        walk = Walk(
            depths=depths,
            lesson=self.lesson,
            loss=loss,
            projection=self.projection,
            chunk_rows=self.chunk_rows,
        )
        device = self.lesson.index_U.device
        found = [torch.zeros(len(t.state_N), device=device) for t in walk.taught]
        for piece, rows_n, target in walk.look():
            rows = piece.taught.given(piece.leaf(rows_n), rows_n, self.lesson, target)
            found[piece.k][rows_n] = of(rows)
        return [(t.state_N, x) for t, x in zip(walk.taught, found, strict=True)]


class Weighting(ABC):
    """Depths of a batch -> the same depths with masks and weights."""

    needs_target: bool = False
    """Whether it looks at p, even where the loss does not."""

    @abstractmethod
    def check(self, drafter: Drafter) -> None:
        """Raises ValueError for a drafter that cannot be weighted like this."""

    @abstractmethod
    def __call__(self, situation: Situation) -> list[Depth]:
        """The depths to learn from."""


class _ByBlock(Weighting):
    """Base of weightings along a block."""

    def check(self, drafter: Drafter) -> None:
        # A recurrent drafter of tokens has exits, not drafts, for depths.
        recurrent = drafter.max_depth is None and not drafter.reads_features
        if drafter.num_depths < 2 or recurrent:
            raise ValueError(
                f"weighting {type(self).__name__} weighs the drafts made from one position against "
                f"each other, but {type(drafter).__name__} is trained on one draft a position "
                f"(num_depths={drafter.num_depths}); use weighting=null or a drafter with several "
                "depths."
            )

    def __call__(self, situation: Situation) -> list[Depth]:
        depths = situation.depths
        shapes = {depth.states_BNd.shape[:2] for depth in depths}
        assert len(shapes) == 1, "the depths of a block have their states at the same indices"
        device = depths[0].states_BNd.device
        value_KM = torch.ones(len(depths), shapes.pop().numel(), device=device)
        counts_KM = torch.zeros_like(value_KM, dtype=torch.bool)
        for k, (state_n, value_n) in enumerate(situation.rows(depths, CrossEntropy(), self._value)):
            value_KM[k, state_n] = value_n
            counts_KM[k, state_n] = True
        return self._weigh(depths, value_KM, counts_KM)

    @abstractmethod
    def _value(self, rows: Rows) -> Tensor:
        """What is looked at in a row, in [0, 1]; slots that do not count have 1."""

    @abstractmethod
    def _weigh(self, depths: Sequence[Depth], value_KM: Tensor, counts_KM: Tensor) -> list[Depth]:
        """Depths from the values of all slots."""


class DPace(_ByBlock):
    """D-PACE: a slot weighs as much as the drafts that depend on it are likely to be reached.

    q_k is the draft's probability of the label at slot k, s_k = (1 - a) q_k + a with a = `smooth`,
    P_k = prod_{j <= k} s_j the chance that the block survives slot k, and

        w_k = sum_{j >= k} P_j

    without gradient: early slots weigh more, and the more so the better the block is predicted.
    Slots that do not count have s = 1 and no term in the sum. (D-PACE as in SpecForge, a = 0.5.)
    Labels outside a reduced vocabulary have q = 0.
    """

    def __init__(self, *, smooth: float = 0.5) -> None:
        if not 0.0 <= smooth <= 1.0:
            raise ValueError(
                f"weighting.smooth={smooth} must lie between 0 and 1: a slot counts as reached "
                "with the chance (1 - smooth) q + smooth."
            )
        self.smooth = smooth

    def _value(self, rows: Rows) -> Tensor:
        label_q_n = rows.logq_ND.gather(-1, rows.label_N.clamp(min=0)[:, None])[:, 0].exp()
        return torch.where(rows.label_N >= 0, label_q_n, torch.zeros_like(label_q_n))

    def _weigh(self, depths: Sequence[Depth], value_KM: Tensor, counts_KM: Tensor) -> list[Depth]:
        reached_KM = (1.0 - self.smooth) * value_KM + self.smooth
        survives_KM = reached_KM.where(counts_KM, 1.0).cumprod(0) * counts_KM
        weight_KM = survives_KM.flip(0).cumsum(0).flip(0)
        return [_weighed(depth, weight_KM[k]) for k, depth in enumerate(depths)]


class ValidPrefix(_ByBlock):
    """Loss up to and including the first draft error of a block, nothing behind it.

    Slot k counts iff the drafts of all slots before it, j < k, are right: the label is among the
    draft's `top` most likely tokens. What comes behind an error is never accepted. (SpecBlock's
    valid prefix and accept-until-fail, arXiv 2607.01893: top 1; GRIFFIN's token alignment,
    arXiv 2502.11018: top 3.) Slots that do not count in the loss break nothing.
    """

    def __init__(self, *, top: int = 1) -> None:
        if top < 1:
            raise ValueError(
                f"weighting.top={top} must be at least 1: a draft is right if the label is among "
                "that many of its most likely tokens."
            )
        self.top = top

    def _value(self, rows: Rows) -> Tensor:
        label_logq_n = rows.logq_ND.gather(-1, rows.label_N.clamp(min=0)[:, None])[:, 0]
        lowest_n = rows.logq_ND.topk(min(self.top, rows.logq_ND.shape[-1])).values[:, -1]
        return ((label_logq_n >= lowest_n) & (rows.label_N >= 0)).float()

    def _weigh(self, depths: Sequence[Depth], value_KM: Tensor, counts_KM: Tensor) -> list[Depth]:
        right_KM = value_KM.cumprod(0) > 0
        made, before_M = [], torch.ones_like(right_KM[0])
        for k, depth in enumerate(depths):
            made.append(_masked(depth, before_M))
            before_M = right_KM[k]
        return made


class AdaSpec(Weighting):
    """Learn the tokens where the draft is furthest behind a reference (AdaSPEC, NeurIPS 2025).

    `reference` is the folder of a finished drafter of the same kind, frozen (AdaSPEC trains it with
    the forward KL first). For every row excess = KL(p || q) - KL(p || q_reference); the share
    `keep` of the rows of a depth with the largest excess counts, ceil(keep n) of n and those that
    tie with the last, over all ranks. Tokens that are hard for both drop out. The kept rows weigh n
    / kept, so that the loss is the mean over them.
    """

    needs_target = True

    def __init__(self, *, reference: str, target: Target, keep: float = 0.4) -> None:
        if not 0.0 < keep <= 1.0:
            raise ValueError(
                f"weighting.keep={keep} must be above 0 and at most 1: it is the share of tokens "
                "that is learned (AdaSPEC: 0.4)."
            )
        self.keep = keep
        self.folder = reference
        self.reference = load_drafter(reference, target).requires_grad_(False)

    def check(self, drafter: Drafter) -> None:
        other = self.reference
        for what, ours, theirs in (
            ("class", type(drafter).__name__, type(other).__name__),
            ("number of depths", drafter.num_depths, other.num_depths),
            ("draft vocabulary", drafter.draft_vocab_size, other.draft_vocab_size),
        ):
            if ours != theirs:
                raise ValueError(
                    f"The reference in weighting.reference={self.folder} has another {what} "
                    f"({theirs}) than the drafter that is trained ({ours}), so their losses cannot "
                    "be compared row by row; give a finished run of the same drafter."
                )
        ids, others = drafter.draft_ids_D, other.draft_ids_D
        if ids is not None and others is not None and not torch.equal(ids.cpu(), others.cpu()):
            raise ValueError(
                f"The reference in weighting.reference={self.folder} drafts over other tokens "
                "(same number, other ids); train it on the same dataset, from which the draft "
                "vocabulary is chosen."
            )

    @torch.no_grad()
    def __call__(self, situation: Situation) -> list[Depth]:
        depths = situation.depths
        loss = ForwardKL()
        theirs = [
            replace(depth, mask_BN=own.mask_BN)
            for depth, own in zip(
                self.reference.unroll(situation.features, situation.tokens_BT), depths, strict=True
            )
        ]
        drafted, referred = (situation.rows(these, loss, loss) for these in (depths, theirs))
        made = []
        for depth, (state_n, draft_n), (same_n, reference_n) in zip(
            depths, drafted, referred, strict=True
        ):
            assert torch.equal(state_n, same_n)
            excess_n = draft_n - reference_n
            everyone = _all_ranks(excess_n)
            count = math.ceil(self.keep * len(everyone))
            kept_n = excess_n >= everyone.topk(count).values[-1] if count else excess_n > 0
            kept_M = torch.zeros(depth.states_BNd.shape[:2].numel(), device=excess_n.device)
            kept_M[state_n] = kept_n.float()
            weight_M = torch.full_like(kept_M, len(everyone) / max(count, 1))
            made.append(_weighed(_masked(depth, kept_M > 0), weight_M))
        return made


def _masked(depth: Depth, keep_M: Tensor) -> Depth:
    """The depth without the states that are not kept."""
    keep_BN = keep_M.view(depth.states_BNd.shape[:2])
    return replace(depth, mask_BN=keep_BN if depth.mask_BN is None else keep_BN & depth.mask_BN)


def _weighed(depth: Depth, weight_M: Tensor) -> Depth:
    """The depth with its weights multiplied."""
    weight_BN = weight_M.view(depth.states_BNd.shape[:2])
    earlier = depth.weight_BN
    return replace(depth, weight_BN=weight_BN if earlier is None else weight_BN * earlier)


def _all_ranks(values_n: Tensor) -> Tensor:
    """These values of all processes, one behind the other."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return values_n
    world = distributed.get_world_size()
    size = torch.tensor(len(values_n), device=values_n.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    distributed.all_gather(sizes, size)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, device=values_n.device)
    padded[: len(values_n)] = values_n
    gathered = [torch.zeros_like(padded) for _ in range(world)]
    distributed.all_gather(gathered, padded)
    return torch.cat([g[: int(s)] for g, s in zip(gathered, sizes, strict=True)])
