"""How often a drafter's drafts would be accepted on answers that were served, without decoding.

Lossless decoding gives the answer y the target's own law whatever was drafted, so any drafter can
be asked afterwards. Given y, the draft of depth k at answer token j had been accepted with

    a_k(j) = min(1, q(y_j) / p(y_j)),   p and q after y_0..y_{j-1}, at the serving temperature

(at temperature 0: 1 where the drafter's argmax is y_j, else 0). decode/rounds.py has the reasons.
In bf16 a forward over the whole text may break near-ties of logits otherwise than the decoder's.

Two drafters are compared by the accepted drafts of a chain of K drafts begun at every answer token,

    A(i) = sum_{k<K} prod_{m<=k} a_m(i + m),

summed over the tokens of each prompt. Tokens of one prompt depend on each other, so the difference
has its standard error over prompts, of the paired differences.

Shape legend: K depths, J answer tokens, N rows, D draft vocabulary, V target vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.drafter.base import Depth, Drafter, served_depth
from models.sampling import probabilities
from train.online.served import Served, Texts


@dataclass(frozen=True)
class Serving:
    """How drafts are made and tested: `gamma` in a row, temperatures of target and drafts."""

    gamma: int
    temperature: float
    draft_temperature: float
    top_p: float


@torch.no_grad()
def chances(drafter: Drafter, served: Served, serving: Serving) -> Tensor:
    """a_k(j), `[K, J]`; entries j < 1 + k are 0, because a round begins at y_1 at the earliest."""
    texts = Texts.of([served], drafter.target.device, drafter.dtype)
    depths = list(drafter.unroll(texts.features, texts.tokens_BT))
    assert all(d.positions_BN is None for d in depths), "a replay needs the states of all positions"
    if serving.gamma > len(depths) and depths[-1].shift > 0:
        raise ValueError(
            f"tree.gamma={serving.gamma} drafts were asked for, but this drafter's training view "
            f"has {len(depths)} depths, and drafts beyond them cannot be judged without decoding; "
            f"use tree.gamma={len(depths)} or less."
        )
    answer_J = served.tokens_T[served.prompt :].to(drafter.target.device)
    a_KJ = torch.zeros(serving.gamma, len(answer_J), dtype=torch.float64)
    p_J = None
    if serving.temperature > 0.0:
        p_J = _target_chance(drafter, texts, answer_J, serving)
    for k in range(serving.gamma):
        depth, first = depths[served_depth(depths, k)], 1 + k
        if first >= len(answer_J):
            break
        if k > 0 and depth.shift == 0:
            a_KJ[k, first:] = a_KJ[0, first:]  # one state serves every depth
            continue
        # y_j stands at position P+j, is taught at u = P+j-1 and was drafted at t = u - shift.
        start = served.prompt + first - 1 - depth.shift
        states_Nd = depth.states_BNd[0, start : start + len(answer_J) - first]
        q_N = _draft_chance(drafter, depth, states_Nd, answer_J[first:], serving)
        a_N = q_N if p_J is None else (q_N / p_J[first:]).clamp(max=1.0)
        a_KJ[k, first:] = a_N.cpu()
    return a_KJ


def _target_chance(drafter: Drafter, texts: Texts, answer_J: Tensor, serving: Serving) -> Tensor:
    """p(y_j), `[J]`: f_t predicts x_{t+1}, so y_j is predicted one position before its own."""
    target, end = drafter.target, texts.tokens_BT.shape[1] - 1
    final_Jd = texts.features.final_BTd[0, end - len(answer_J) : end].to(target.dtype)
    p_JV = probabilities(
        target.project(final_Jd), temperature=serving.temperature, top_p=serving.top_p
    )
    return p_JV.gather(-1, answer_J[:, None])[:, 0].double()


def _draft_chance(
    drafter: Drafter, depth: Depth, states_Nd: Tensor, label_N: Tensor, serving: Serving
) -> Tensor:
    """q(y) of each row, in double precision; 0 outside the draft vocabulary."""
    q_ND = probabilities(
        depth.head(states_Nd), temperature=serving.draft_temperature, top_p=serving.top_p
    )
    index_N, inside_N = label_N, torch.ones_like(label_N, dtype=torch.bool)
    if drafter.draft_ids_D is not None:
        # The draft ids are ascending.
        index_N = torch.searchsorted(drafter.draft_ids_D, label_N)
        index_N = index_N.clamp(max=len(drafter.draft_ids_D) - 1)
        inside_N = drafter.draft_ids_D[index_N] == label_N
    return q_ND.gather(-1, index_N[:, None])[:, 0].double() * inside_N


def chain_accepted(a_KJ: Tensor) -> float:
    """sum_i A(i) over the starts i = 1..J-1; drafts past the end of the answer add nothing."""
    alive_J = torch.ones(a_KJ.shape[1], dtype=a_KJ.dtype)
    total = 0.0
    for k in range(len(a_KJ)):
        # Draft k of the chain that starts at i meets y_{i+k}.
        ahead_J = torch.zeros_like(alive_J)
        ahead_J[: a_KJ.shape[1] - k] = a_KJ[k, k:]
        alive_J = alive_J * ahead_J
        total += float(alive_J[1:].sum())
    return total


@dataclass(frozen=True)
class Rounds:
    """Rounds of one answer and its drafts: whole numbers when decoded, expected ones in a replay.

    Drafts past the end of the answer count as not tested.
    """

    rounds: float
    tested: float
    accepted: float


def replay_rounds(a_KJ: Tensor) -> Rounds:
    """Expected rounds of chains of K drafts: the first refusal at depth k makes the next round
    begin k+1 tokens on, K accepted drafts K+1 tokens on (bonus token)."""
    K, J = a_KJ.shape
    a = a_KJ.tolist()
    begins = [0.0, 1.0, *[0.0] * (J + K)]
    rounds = tested = accepted = 0.0
    for i in range(1, J):
        alive = begins[i]
        rounds += alive
        for k in range(K):
            if i + k >= J:
                break
            passed = alive * a[k][i + k]
            tested += alive
            accepted += passed
            begins[i + k + 1] += alive - passed
            alive = passed
        else:
            begins[i + K + 1] += alive
    return Rounds(rounds, tested, accepted)


@dataclass(frozen=True)
class Comparison:
    """Accepted drafts of a chain per answer token, of two drafters on the same prompts.

    `gain` is the difference and `error` its standard error, nan when there are too few prompts.
    """

    prompts: int
    tokens: int
    serving: float
    shadow: float
    gain: float
    error: float


def compare(serving: Sequence[float], shadow: Sequence[float], tokens: Sequence[int]) -> Comparison:
    """A ratio of sums over prompts, differences over tokens, linearised for its error."""
    n, total = len(tokens), max(1, sum(tokens))
    gain = (sum(shadow) - sum(serving)) / total
    # The residual of a prompt: its difference beyond what the mean gain gives its tokens.
    spread = sum(
        (new - old - gain * count) ** 2
        for old, new, count in zip(serving, shadow, tokens, strict=True)
    )
    error = math.sqrt(n / (n - 1) * spread) / total if n > 1 else math.nan
    return Comparison(n, sum(tokens), sum(serving) / total, sum(shadow) / total, gain, error)
