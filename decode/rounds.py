"""The rounds a decoder would make along a recorded answer, without decoding.

Why this is exact. Let y_0 y_1 ... be an answer of the target (decode/answers.py), and let a round
begin when y_0..y_{i-1} are known; its draft k is put to the test at y_{i+k}.

- Lossless decoding gives y the target's own law whatever was drafted. At temperature 0 it gives the
  target's greedy answer itself: draft k is accepted iff drafts 0..k are y_i..y_{i+k}.
- At temperature T a draft x ~ q is accepted with min(1, p(x) / q(x)) and otherwise replaced by a
  draw from norm((p - q)+). The joint law of "accepted, and the output is y" is min(p(y), q(y)), and
  the output alone has law p. So, given the output y, its draft had been accepted with

      a_k(i + k) = min(1, q(y) / p(y)),   p and q after y_0..y_{i+k-1}

  independently of the other positions, because neither p nor q looks at how the tokens before
  were made. Greedy drafts are q one-hot (a is 1 at the argmax, else 0), greedy targets p(y) = 1.
- The drafts before k were accepted, so they *are* the answer's tokens: q_k is the drafter's
  teacher-forced distribution, which `unroll` gives at all positions at once (train = decode).

Rounds are then counted without the noise of drafts and coins. Let s(i) be the probability that a
round begins at i; s(1) = 1, because y_0 comes from the prompt's forward. A round passes depth k
with a_k. After a refusal at depth k the next one begins at i+k+1, after gamma passes (bonus token)
at i+gamma+1. An accepted end-of-answer token ends the round and the answer. A round begins only
while fewer than max_new_tokens tokens are known, and may run past them; what it produces there
counts, as in decode/session.py. At temperature 0 all probabilities are 0 or 1 and the counts are
those of the decoder; otherwise they are its expected counts given the answers.

Not covered: nucleus sampling (top_p < 1), lossy verifiers. Trees, and drafters that stop or leave
by themselves, are walked round by round (decode/walk.py).
In bf16 a batched forward may break near-ties of logits otherwise than the decoder's.

Shape legend: K depths, A answers, J answer tokens, B sequences, T positions, N rows, D draft
vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decode.answers import Recording, chunks, padded_batches
from decode.baselines.base import Baseline
from models.drafter.base import Depth, Drafter
from models.target import Features, Target


@torch.inference_mode()
def acceptance(
    target: Target, drafter: Drafter, recording: Recording, *, depths: int, draft_temperature: float
) -> np.ndarray:
    """a_k(j), `[K, A, J]`: the chance that the depth-k draft at answer token j was accepted.

    The round of that draft began at token j - k, so j >= 1 + k; other entries are 0. The target
    runs again (once over each answer, no decoding) only for a drafter that reads its features.
    """
    answers = recording.answers
    longest = max(len(a.tokens) for a in answers)
    accept_KAJ = np.zeros((depths, len(answers), longest))
    for batch, tokens_BT in padded_batches([a.text for a in answers]):
        tokens_BT = tokens_BT.to(target.device)
        features = read_features(target, drafter, tokens_BT)
        views = list(drafter.unroll_to(features, tokens_BT, depths))
        recurrent = _check_views(views, depths)
        for k in range(depths):
            view = views[-1] if recurrent else views[k]
            for row, i in enumerate(batch):
                first, tokens = 1 + k, answers[i].tokens
                if len(tokens) <= first:
                    continue
                if recurrent and k > 0:
                    # One state serves every depth: the same chance at the same token.
                    accept_KAJ[k, i, first:] = accept_KAJ[0, i, first:]
                    continue
                # Answer token j is taught at position len(prompt) + j - 1; the state that drafts
                # it stands `shift` before.
                start = len(answers[i].prompt.tokens) + first - 1 - view.shift
                states_Nd = view.states_BNd[row, start : start + len(tokens) - first]
                accept_KAJ[k, i, first : len(tokens)] = _accept(
                    drafter,
                    view,
                    states_Nd,
                    torch.tensor(tokens[first:], device=target.device),
                    torch.tensor(answers[i].logp[first:], device=target.device),
                    draft_temperature,
                )
    return accept_KAJ


def expected_counts(
    accept_KAJ: np.ndarray, lengths: Sequence[int], *, gamma: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Expected rounds, tokens produced, and drafts tested and accepted by depth, of each answer."""
    n_A = np.array(lengths)
    begin_AJ = np.zeros((len(n_A), int(n_A.max()) + gamma + 2))  # s(i), see the top
    begin_AJ[:, 1] = 1.0
    rounds_A, produced_A = np.zeros(len(n_A)), np.zeros(len(n_A))
    tested_KA, accepted_KA = np.zeros((2, gamma, len(n_A)))
    for i in range(1, min(max_new_tokens, int(n_A.max()))):
        # An answer that has ended (n tokens, the last one EOS) begins no further round.
        alive_A = begin_AJ[:, i] * (i < n_A)
        rounds_A += alive_A
        for k in range(gamma):
            j = i + k
            # Past the end nothing is alive any more: accepting the last token ended the answer.
            chance_A = accept_KAJ[k, :, j] if j < accept_KAJ.shape[2] else np.zeros(len(n_A))
            tested_KA[k] += alive_A
            refused_A = alive_A * (1.0 - chance_A)
            produced_A += (k + 1) * refused_A
            begin_AJ[:, j + 1] += refused_A
            alive_A = alive_A * chance_A
            accepted_KA[k] += alive_A
            produced_A += (k + 1) * alive_A * (j == n_A - 1)
            alive_A = alive_A * (j < n_A - 1)
        produced_A += (gamma + 1) * alive_A
        begin_AJ[:, i + gamma + 1] += alive_A
    return [
        {
            "rounds": float(rounds_A[a]),
            "produced": float(produced_A[a]),
            "tested_by_depth": _trimmed(tested_KA[:, a]),
            "accepted_by_depth": _trimmed(accepted_KA[:, a], tested_KA[:, a]),
        }
        for a in range(len(n_A))
    ]


def read_features(target: Target, drafter: Drafter | Baseline, tokens_BT: Tensor) -> Features:
    """What the drafter may read of the target: nothing (width 0) when it reads tokens only."""
    if not drafter.reads_features:
        return Features(torch.empty(*tokens_BT.shape, 0, device=tokens_BT.device))
    return target.forward(tokens_BT, layers=drafter.feature_layers).to(drafter.dtype)


def _check_views(views: Sequence[Depth], depths: int) -> bool:
    """Whether the family is recurrent (its last view serves every depth)."""
    if any(v.positions_BN is not None or v.mask_BN is not None for v in views):
        raise ValueError(
            "This drafter's training view leaves out positions, so it cannot be replayed, which "
            "needs every one; measure it with the decoder (without replay)."
        )
    if views[-1].shift == 0:
        return True
    if depths > len(views):
        raise ValueError(
            f"Chains of {depths} drafts were asked for, but this drafter's training view has "
            f"{len(views)} depths, and drafts beyond them read what only decoding makes; give "
            f"replay.gammas of at most {len(views)}."
        )
    assert [v.shift for v in views] == [1 + k for k in range(len(views))]
    return False


def _accept(
    drafter: Drafter,
    view: Depth,
    states_Nd: Tensor,
    label_N: Tensor,
    logp_N: Tensor,
    temperature: float,
) -> np.ndarray:
    """min(1, q(y) / p(y)) of each row."""
    found = []
    for piece, states_nd in chunks(states_Nd, view.head.vocab_size):
        logits_nD, label_n = view.head(states_nd).float(), label_N[piece]
        if temperature == 0.0:
            found.append((drafter.to_target_ids(logits_nD.argmax(-1)) == label_n).double())
            continue
        index_n, inside_n = label_n, torch.ones_like(label_n, dtype=torch.bool)
        if drafter.draft_ids_D is not None:
            # The draft ids are ascending; a label outside them has q(y) = 0.
            index_n = torch.searchsorted(drafter.draft_ids_D, label_n)
            index_n = index_n.clamp(max=len(drafter.draft_ids_D) - 1)
            inside_n = drafter.draft_ids_D[index_n] == label_n
        logq_nD = (logits_nD / temperature).log_softmax(-1)
        logq_n = logq_nD.gather(-1, index_n[:, None])[:, 0]
        found.append((logq_n - logp_N[piece]).clamp(max=0.0).double().exp() * inside_n)
    return torch.cat(found).cpu().numpy()


def _trimmed(counts_K: np.ndarray, tested_K: np.ndarray | None = None) -> list[float]:
    """Counts of the depths that were reached at all, as the decoder lists them."""
    reached = counts_K if tested_K is None else tested_K
    return counts_K[: int(np.count_nonzero(reached))].tolist()
