"""What a drafter would draft from every position of recorded answers, and what becomes of it.

A decoder's rounds begin at positions that depend on the rule that ends drafts. Here a draft of full
length is made at *every* position, so that the rounds of any rule can be read off afterwards
(decode/simulate.py), and so that chances of acceptance can be compared with what happened
(decode/calibration.py).

Why this is exact. Let the recorded answer be y, a draw from the target. Lossless decoding gives y
whatever was drafted, and a draft x ~ q at a place where y_j comes next is accepted with min(1,
p(x) / q(x)). The joint law of "accepted, and y_j comes out" is min(p(y_j), q(y_j)) (decode/
rounds.py). So, given y_j:

    with min(1, q(y_j) / p(y_j)) the draft was y_j and was accepted;
    otherwise it was drawn from norm((q - p)+) and was rejected, and what follows it was drawn
    from q behind a text that is not the answer.

The drafts here are drawn that way: jointly with the answer they have the law of a real round. At
temperature 0 a draft is the drafter's best token, and accepted iff it is y_j.

Shape legend: I positions of one answer, N answer tokens, K depths, V target vocabulary, D draft
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from decode.answers import Recorded
from decode.chance import SeededChance
from decode.rounds import read_features
from decode.stop.base import SeenLive
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.sampling import probabilities
from models.target import Target

SIGNALS = ("best", "drawn", "entropy", "judged", "truth")
"""Of each drafted token: max q, q of the token and H(q) at temperature 1; the acceptance head's
logit before any T_k (0 without a head); and, where it was put to the test, the chance it really
had, min(1, p/q) of the token (greedy: whether it passed)."""


@dataclass(frozen=True)
class Walked:
    """One answer. Position i stands for a round that begins when y_0..y_{i-1} are known, i >= 1.

    `starts_I` are those positions. `tested_I` and `accepted_I` count depths of the full draft as in
    decode/session.py; `signals_IKS` are those of SIGNALS. `ends_I` says that accepting all of
    `accepted_I` ended the answer. `length` is the number of tokens a decoder would have to write.
    """

    prompt_id: str
    length: int
    starts_I: np.ndarray
    tested_I: np.ndarray
    accepted_I: np.ndarray
    ends_I: np.ndarray
    signals_IKS: np.ndarray


@dataclass
class Trace:
    """All answers. `lag`: by how many depths the acceptance head is behind."""

    gamma: int
    temperature: float
    lag: int
    walked: list[Walked] = field(default_factory=list)
    leave_at: int | None = None


class Shadow(Policy):
    """Drafts jointly with the answer that is known to come out. One object for one position.

    `coming` are the answer's tokens from here on; `p` gives the target's row before each of them
    (None: greedy).
    """

    name = "shadow"

    def __init__(
        self,
        *,
        gamma: int,
        temperature: float,
        coming: Sequence[int],
        p: Callable[[int], Tensor] | None,
        chance: SeededChance,
        leave_at: int | None = None,
    ) -> None:
        self.gamma, self.temperature, self.leave_at = gamma, temperature, leave_at
        self.coming, self.p, self.chance = coming, p, chance
        self.signals: list[tuple[float, ...]] = []
        self.accepted = self.tested = 0
        self.truth = 0.0
        self.on_text = True
        self._states_Nd = torch.empty(1, 0)

    def begin(self, drafter: Drafter) -> None:
        drafter.leave_at = self.leave_at

    def look(self, states_Nd: Tensor) -> None:
        self._states_Nd = states_Nd

    def grow(
        self, depth: int, frontier: Frontier, logits_ND: Tensor, drafter: Drafter
    ) -> Children | None:
        """The draft that goes with the answer, and its numbers."""
        if depth >= self.gamma:
            return None
        drafted = self._draft(depth, logits_ND, drafter)
        self.signals.append((*self._numbers(depth, logits_ND, drafted, drafter), self.truth))
        one = torch.ones(1, device=logits_ND.device)
        expand = torch.full((1,), depth + 1 < self.gamma, device=logits_ND.device)
        zero = torch.zeros(1, dtype=torch.long, device=logits_ND.device)
        return Children(drafter.to_target_ids(drafted), zero, one, expand)

    def _draft(self, depth: int, logits_ND: Tensor, drafter: Drafter) -> Tensor:
        """An index of the draft vocabulary, `[1]`."""
        asked = self.on_text and depth < len(self.coming)
        if asked:
            self.tested = depth + 1
        if self.temperature == 0.0:
            drafted = logits_ND.argmax(-1)
            token = int(drafter.to_target_ids(drafted)[0])
            if asked:
                self._judge(token == self.coming[depth])
            return drafted
        q_D = probabilities(logits_ND, temperature=self.temperature)[0]
        if not asked:
            self.on_text = False
            return self._drawn(q_D)
        assert self.p is not None
        p_V, y = self.p(depth), self.coming[depth]
        ids_D = drafter.draft_ids_D
        if ids_D is None:
            p_D, index_1 = p_V, torch.tensor([y], device=q_D.device)
        else:
            p_D, index_1 = p_V[ids_D], (ids_D == y).nonzero()[:, 0]
        q_y = float(q_D[index_1].sum())  # 0 for a token that cannot be drafted
        self._judge(self.chance.coin(q_y / max(float(p_V[y]), 1e-30)))
        drafted = index_1
        if not self.on_text:
            left_D = (q_D - p_D).clamp(min=0.0)
            drafted = self._drawn(left_D if float(left_D.sum()) > 0.0 else q_D)
        self.truth = min(1.0, float(p_D[drafted[0]]) / max(float(q_D[drafted[0]]), 1e-30))
        return drafted

    def _judge(self, accepted: bool) -> None:
        self.accepted += int(accepted)
        self.on_text = accepted
        self.truth = float(accepted)

    def _drawn(self, q_D: Tensor) -> Tensor:
        return torch.tensor([self.chance.draw(q_D)], device=q_D.device)

    def _numbers(
        self, depth: int, logits_ND: Tensor, drafted: Tensor, drafter: Drafter
    ) -> tuple[float, ...]:
        """SIGNALS of the token but the last."""
        judge = drafter.acceptance
        seen = SeenLive(
            depth,
            logits_ND=logits_ND,
            drafted_N=drafted,
            states_Nd=self._states_Nd,
            drafter=drafter,
            judge=judge,
        )
        return seen.best, seen.drawn, seen.entropy, seen.judged if judge is not None else 0.0


@torch.inference_mode()
def trace(
    target: Target,
    drafter: Drafter,
    answers: Sequence[Recorded],
    *,
    gamma: int,
    temperature: float,
    max_new_tokens: int,
    stride: int = 1,
    seed: int = 0,
    leave_at: int | None = None,
    on_answer: Callable[[int, float], None] | None = None,
) -> Trace:
    """Drafts of `gamma` tokens at every `stride`-th position of every answer.

    A round begins at i only while fewer than `max_new_tokens` tokens are known and none ends the
    answer. `on_answer(done, tokens a whole draft gives so far)` reports progress. Recorded answers
    that were cut off end without a token to stop at: the tokens behind
    `max_new_tokens` are read as what comes, and where they run out nothing is tested. `leave_at` is
    the exit that all drafts come from, of a drafter that has several.
    """
    judge = drafter.acceptance
    made = Trace(gamma, temperature, 0 if judge is None else judge.lag, leave_at=leave_at)
    chance = SeededChance(seed=seed ^ 0x7ACE)
    for done, answer in enumerate(answers):
        made.walked.append(_walk(target, drafter, answer, made, max_new_tokens, stride, chance))
        if on_answer is not None:
            full = np.concatenate([w.accepted_I for w in made.walked])
            on_answer(done + 1, 1.0 + float(full.mean()) if len(full) else 1.0)
    return made


def _walk(
    target: Target,
    drafter: Drafter,
    answer: Recorded,
    made: Trace,
    max_new_tokens: int,
    stride: int,
    chance: SeededChance,
) -> Walked:
    y, start = answer.tokens, len(answer.prompt.tokens)
    text_1T = torch.tensor([answer.text], device=target.device)
    ended = y[-1] in target.eos_ids
    last = min(len(y), max_new_tokens)
    final_Td: Tensor | None = None
    if drafter.reads_features or made.temperature > 0.0:
        features = target.forward(text_1T, layers=drafter.feature_layers)
        final_Td = features.final_BTd[0]
        features = features.to(drafter.dtype)
    else:
        features = read_features(target, drafter, text_1T)
    p_NV: Tensor | None = None
    if made.temperature > 0.0:
        # y_j is predicted at the position before it. All rows at once: one row costs as much.
        assert final_Td is not None
        logits_NV = target.project(final_Td[start - 1 : start - 1 + len(y)])
        p_NV = probabilities(logits_NV, temperature=made.temperature)
    state = drafter.start(features[:, :start], text_1T[:, : start + 1])
    starts, shadows = [], []
    for i in range(1, last):
        if (i - 1) % stride == 0:

            def p(depth: int, i: int = i) -> Tensor:
                assert p_NV is not None
                return p_NV[i + depth]

            shadow = Shadow(
                gamma=made.gamma,
                temperature=made.temperature,
                coming=y[i : i + made.gamma],
                p=p if made.temperature > 0.0 else None,
                chance=chance,
                leave_at=made.leave_at,
            )
            root = text_1T[0, start + i - 1 : start + i]
            drafter.propose(state, root, shadow)
            starts.append(i)
            shadows.append(shadow)
        here = start + i - 1
        state = drafter.extend(state, features[:, here : here + 1], text_1T[:, here + 1 : here + 2])
    return Walked(
        prompt_id=answer.prompt.id,
        length=last,
        starts_I=np.array(starts, dtype=np.int64),
        tested_I=np.array([s.tested for s in shadows], dtype=np.int64),
        accepted_I=np.array([s.accepted for s in shadows], dtype=np.int64),
        ends_I=np.array(
            [ended and i + s.accepted == len(y) for i, s in zip(starts, shadows, strict=True)],
            dtype=bool,
        ),
        signals_IKS=np.array([s.signals for s in shadows], dtype=np.float64).reshape(
            len(shadows), made.gamma, len(SIGNALS)
        ),
    )
