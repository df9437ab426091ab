"""What validation measures, teacher-forced, over every held-out position that counts.

    agreement_k  share of positions where the draft's argmax is the target's argmax
    overlap_k    mean of sum_v min(p_v, q_v), p over the full vocabulary: the chance that a draft
                 sampled from q is accepted (with a top-k teacher two numbers, overlap_at_least_k
                 and overlap_at_most_k, because the ids that were not kept are known together only;
                 from draws of p an unbiased estimate)
    top10_k      share of positions whose label is among the draft's ten best (the sum over ranks of
                 rank_accuracy)
    tau          1 + mean over positions t of sum_k prod_{i<=k} [draft i at t agrees]: tokens per
                 step of a greedy chain, bonus token included, were the drafts before always fed
                 with true tokens

Shape legend: K depths, R ranks, B sequences, T positions, U teacher positions, N rows, n chunk
rows, D draft vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_prep.signal import SignalRows
from models.drafter.base import Depth, Drafter, served_depth
from train.chunked import batch_statistics
from train.lesson import Lesson
from train.losses import RowLoss
from train.teacher import Teacher
from train.walk import Walk

RANKS = 10
UNLIMITED_CHAIN = 8
"""Chain length of the tau estimate for a drafter without a longest draft."""


@dataclass
class Tally:
    """Sums over positions; two tallies add up, over batches and over ranks."""

    count_K: Tensor
    loss_K: Tensor
    agree_K: Tensor
    overlap_K: Tensor
    rank_KR: Tensor
    chain: Tensor
    """[number of positions t, sum of accepted chain lengths]"""
    spare_K: Tensor
    """What overlap_K would have more if the upper end of what is known of it were true."""
    bracket: bool = False
    """Whether that is a bracket and not a number."""

    @staticmethod
    def empty(depths: int, device: torch.device, *, bracket: bool = False) -> "Tally":
        zeros_K = torch.zeros(depths, dtype=torch.float64, device=device)
        ranks_KR = torch.zeros(depths, RANKS, dtype=torch.float64, device=device)
        return Tally(
            zeros_K,
            zeros_K.clone(),
            zeros_K.clone(),
            zeros_K.clone(),
            ranks_KR,
            zeros_K.new_zeros(2),
            zeros_K.clone(),
            bracket,
        )

    def tensors(self) -> list[Tensor]:
        """Every sum, for adding and reducing in place."""
        return [
            self.count_K, self.loss_K, self.agree_K, self.overlap_K, self.rank_KR, self.chain,
            self.spare_K,
        ]  # fmt: skip

    def rank_accuracy(self) -> list[list[float]]:
        """a_k(r): share of positions whose label is the draft's rank-r token at depth k."""
        return (self.rank_KR / self.count_K.clamp(min=1)[:, None]).tolist()

    def summary(self, depth_decay: float, *, trained: int | None = None) -> dict[str, float]:
        """Named numbers. The loss is that of training: the first `trained` depths, weighted."""
        count_K = self.count_K.clamp(min=1)
        weights_K = depth_decay ** torch.arange(len(count_K), device=count_K.device)
        weights_K[len(weights_K) if trained is None else trained :] = 0.0
        numbers = {
            "loss": float((weights_K * self.loss_K / count_K).sum()),
            "tau": 1.0 + float(self.chain[1] / self.chain[0].clamp(min=1)),
        }
        overlap = {"overlap": self.overlap_K}
        if self.bracket:
            overlap = {
                "overlap_at_least": self.overlap_K,
                "overlap_at_most": self.overlap_K + self.spare_K,
            }
        means = {"agreement": self.agree_K, **overlap, "top10": self.rank_KR.sum(-1)}
        for name, sums_K in means.items():
            for k, share in enumerate((sums_K / count_K).tolist()):
                numbers[f"{name}_{k}"] = share
        return numbers


def drafted_ranks(tally: Tally, drafter: Drafter) -> list[list[float]]:
    """a_k(r) of the draft depths a tree may use. Without a longest draft the last one measured
    stands for all deeper ones; a drafter of tokens alone is served by its last exit at every depth.
    """
    ranks_KR = tally.rank_accuracy()
    if drafter.max_depth is not None:
        return ranks_KR
    measured_KR = ranks_KR if drafter.reads_features else ranks_KR[-1:]
    return measured_KR + [measured_KR[-1]] * (UNLIMITED_CHAIN - len(measured_KR))


@torch.no_grad()
def tally_batch(
    *,
    depths: Sequence[Depth],
    lesson: Lesson,
    loss: RowLoss,
    teacher: Teacher,
    draft_ids_D: Tensor | None,
    chunk_rows: int,
    max_depth: int | None,
    signal: SignalRows | None = None,
) -> Tally:
    """Measure one batch, chunk by chunk. The drafter's head runs in fp32: bf16 logits have ties."""
    device = lesson.index_U.device
    tally = Tally.empty(len(depths), device)
    depths = [replace(depth, states_BNd=depth.states_BNd.float()) for depth in depths]
    with torch.autocast(device.type, enabled=False):
        walk = Walk(
            depths=depths, lesson=lesson, loss=loss, projection=teacher, chunk_rows=chunk_rows
        )
        # Of this process: validation batches need not be as many on every rank.
        statistics_KS = batch_statistics(walk, all_ranks=False) if loss.num_statistics else None
    U = len(lesson.index_U)
    agrees_KU = torch.zeros(len(depths), U, dtype=torch.bool, device=device)
    counts_KU = torch.zeros_like(agrees_KU)
    for start in range(0, U, chunk_rows):
        stop = min(start + chunk_rows, U)
        kept = None if signal is None else signal[start:stop]
        if kept is None:
            final_nd = lesson.final_Ud[start:stop]
            logz_n, best_n = teacher.full(final_nd)
            target = teacher.rows(final_nd, logz_n)
        else:
            best_n, target = kept.best_N, lesson.taught(teacher, start, stop)
        for k, taught in enumerate(walk.taught):
            rows_n = slice(*walk.find(taught, [start, stop]))
            taught_n = taught.teacher_N[rows_n] - start
            own = target.take(taught_n)
            with torch.autocast(device.type, enabled=False):
                logits_nD = taught.logits(rows_n)
                rows = taught.given(
                    logits_nD,
                    rows_n,
                    lesson,
                    own,
                    feature_nd=taught.features(rows_n) if loss.needs_features else None,
                    statistics_S=None if statistics_KS is None else statistics_KS[k],
                )
                logq_nD, label_n = rows.logq_ND, rows.label_N
                tally.loss_K[k] += taught.weighted(loss(rows), rows_n).sum()
                if kept is None:
                    tally.overlap_K[k] += torch.minimum(own.p_ND, own.view(logq_nD).exp()).sum()
                else:
                    low_n, high_n = teacher.acceptance(kept[taught_n], logq_nD)
                    tally.overlap_K[k] += low_n.sum()
                    tally.spare_K[k] += (high_n - low_n).sum()
            top_nR = logq_nD.topk(min(RANKS, logq_nD.shape[-1])).indices
            hits_R = (top_nR == label_n[:, None]).sum(0)
            tally.rank_KR[k, : len(hits_R)] += hits_R
            drafted_n = top_nR[:, 0] if draft_ids_D is None else draft_ids_D[top_nR[:, 0]]
            tally.count_K[k] += len(taught_n)
            agrees_KU[k, taught_n + start] = drafted_n == best_n[taught_n]
            counts_KU[k, taught_n + start] = True
    tally.agree_K += agrees_KU.sum(-1)
    tally.chain += chain_lengths(depths, lesson, agrees_KU, counts_KU, max_depth)
    return tally


def chain_lengths(
    depths: Sequence[Depth],
    lesson: Lesson,
    agrees_KU: Tensor,
    counts_KU: Tensor,
    max_depth: int | None,
) -> Tensor:
    """[positions t, sum over them of sum_k prod_{i<=k} agree].

    Draft k of a chain that starts at t is taught at position u = t+1+k. It comes from the depth
    that serves k (models.drafter.base.served_depth).
    Positions t are those whose first draft counts; drafts past the last token to learn count as
    refused, because there is nothing to accept.
    """
    B, T = lesson.shape
    grid_KBT = torch.zeros(len(depths), B * T, dtype=torch.bool, device=agrees_KU.device)
    grid_KBT[:, lesson.index_U] = agrees_KU
    grid_KBT = grid_KBT.view(len(depths), B, T)
    starts_BT = torch.zeros(B * T, dtype=torch.bool, device=agrees_KU.device)
    starts_BT[lesson.index_U] = counts_KU[0]
    # Index u = t+1 stands for t: shift everything left by the depth's k.
    alive_BT = starts_BT.view(B, T)
    length = torch.zeros((), dtype=torch.float64, device=agrees_KU.device)
    for k in range(max_depth or UNLIMITED_CHAIN):
        ahead_BT = torch.zeros_like(alive_BT)
        if k < T:
            ahead_BT[:, : T - k] = grid_KBT[served_depth(depths, k)][:, k:]
        alive_BT = alive_BT & ahead_BT
        length += alive_BT.sum()
    return torch.stack([starts_BT.sum().double(), length])
