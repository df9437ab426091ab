"""The rounds a decoder would make with a deterministic draft along a recorded answer.

Why this is exact. A draft is deterministic when it is a function of the text so far: a tree of the
drafter's best tokens, a greedy chain (`Tree.q_NV` is None). Lossless verification then amounts to:

    draw y ~ p; if a child of the last accepted node carries y, accept it and go on below it;
    otherwise the round ends, and y is its bonus token.

For q one-hot at x the rule of decode/verifier/sampling.py accepts the first child x with p(x). Then
r(x) <- 0 and r is normalised, so that the second child x' is accepted with (1 - p(x)) r(x') = p(x')
and so on; what no child took is drawn with p(y) as well. "The output is y, and it was a draft" has
the same law in both forms, hence so have all rounds. (At temperature 0 p is one-hot, and both are
the greedy rule.) An answer y_0 y_1 ... of the target (decode/answers.py) is a sequence of such
draws, because p after a text does not depend on how the text was made. So, given the answer, no
chance is left: the rounds are those of a decoder that made these draws. At temperature 0 they are
the decoder's own; at T their mean over answers is the decoder's mean.

Where a round stands. It begins when y_0..y_{i-1} are known; the first one at i = 1, because y_0
comes from the prompt's forward. Its root is y_{i-1}, at position P + i - 1 of prompt and answer
(P prompt tokens). A node at tree depth d (root: 0) is put to the test at y_{i+d-1}. With k drafts
accepted, y_i..y_{i+k-1}, the bonus token is y_{i+k} and the next round begins at i + k + 1, with
that token as its root. The drafter then reads what the target has verified: features at positions
P+i-1..P+i+k-1 (old root and accepted drafts) and the tokens one ahead of them, y_i..y_{i+k}.

A round begins only while fewer than max_new_tokens tokens are known and none ends the answer. It
may run past max_new_tokens and then counts whole, as in decode/session.py: a recording goes on for
LONGEST tokens, so trees of up to LONGEST depths fit. An accepted end-of-answer token ends the round
and the answer, without a bonus token.

What is read of the target are teacher-forced features, the ones a decoder would have had (up to
rounding: in bf16 a near-tie of the drafter's logits may break otherwise). The drafter itself runs
round by round through `start`, `extend` and `propose`, so whatever it or its policy does between
(leave early, stop when unsure, choose nodes) is replayed too, and its time is that of decoding.

Not covered: sampled drafts, nucleus sampling (top_p < 1), lossy verifiers, and methods that learn
from the target's answer to refused drafts (Token Recycling).

Shape legend: B sequences (always 1), T positions.
"""

import time
from typing import Any

import torch
from torch import Tensor

from decode.answers import LONGEST, Recorded
from decode.baselines.base import Baseline
from decode.rounds import read_features
from decode.session import Round
from decode.verifier.base import children_of
from models.drafter.base import Drafter, Policy, Tree
from models.target import Target


@torch.inference_mode()
def walk(
    target: Target,
    drafter: Drafter | Baseline,
    policy: Policy | None,
    answer: Recorded,
    *,
    max_new_tokens: int,
) -> list[Round]:
    """The rounds along one answer; `draft_s` is real, the target's and the verifier's time 0.

    One forward of the target over the answer, none for a drafter that reads tokens only.
    """
    device, y = target.device, answer.tokens
    start, n = len(answer.prompt.tokens), len(answer.tokens)
    text_1T = torch.tensor([answer.text], device=device)
    rounds: list[Round] = []
    if min(n, max_new_tokens) < 2:
        return rounds  # y_0 was all, so no round began
    features = read_features(target, drafter, text_1T)
    # Tokens run one ahead: features of the prompt, tokens of the prompt and y_0.
    state = drafter.start(features[:, :start], text_1T[:, : start + 1])
    i = 1
    while i < min(n, max_new_tokens):
        begin = _now(device)
        tree = _propose(drafter, state, text_1T[0, start + i - 1 : start + i], policy)
        drafted_s = _now(device) - begin
        _check_tree(tree)
        accepted, more = _follow(tree, y[i:])
        ended = i + accepted == n  # the last token, accepted, is the one that ends the answer
        tested = accepted + int(more and not ended)
        begin = _now(device)
        if policy is not None:
            policy.verified(tested, accepted)
        if not ended:
            here = start + i - 1  # the root's position
            state = drafter.extend(
                state,
                features[:, here : here + accepted + 1],
                text_1T[:, here + 1 : here + accepted + 2],
            )
        rounds.append(
            Round(
                nodes=len(tree),
                depth=int(tree.depths_N[-1]),
                accepted=accepted,
                tested=tested,
                produced=accepted + int(not ended),
                draft_s=drafted_s + _now(device) - begin,
                target_s=0.0,
                verify_s=0.0,
            )
        )
        i += accepted + 1
    return rounds


def check_draft(
    target: Target, drafter: Drafter | Baseline, policy: Policy | None, prompt: list[int]
) -> None:
    """Refuse, on the first tokens of a prompt, drafts that a walk cannot follow."""
    if isinstance(drafter, Baseline) and type(drafter).read is not Baseline.read:
        raise ValueError(
            f"{type(drafter).__name__} learns from what the target says to drafts that it refuses, "
            "which recorded answers do not hold; decode with it, without replay."
        )
    text_1T = torch.tensor([[*prompt[:8], prompt[0]]], device=target.device)
    with torch.inference_mode():
        features = read_features(target, drafter, text_1T)
        state = drafter.start(features[:, :-1], text_1T)
        _check_tree(_propose(drafter, state, text_1T[0, -1:], policy))


def _propose(drafter: Drafter | Baseline, state: Any, root: Tensor, policy: Policy | None) -> Tree:
    if isinstance(drafter, Baseline):
        return drafter.propose(state, root)
    assert policy is not None, "a drafter and a policy come together"
    return drafter.propose(state, root, policy)


def _follow(tree: Tree, tokens: list[int]) -> tuple[int, bool]:
    """How many of these tokens the tree drafted, and whether it had a draft for the next one."""
    children, drafts = children_of(tree), tree.tokens_N.tolist()
    node, accepted = 0, 0
    for token in tokens:
        match = [child for child in children[node] if drafts[child] == token]
        if not match:
            break
        node, accepted = match[0], accepted + 1
    return accepted, bool(children[node])


def _check_tree(tree: Tree) -> None:
    if tree.q_NV is not None:
        raise ValueError(
            "This tree's drafts are sampled, while a replay of trees follows drafts that depend on "
            "the text alone; draft greedily (tree.temperature=0), replay chains instead "
            "(replay=chains, which knows the law of sampled ones), or decode without replay."
        )
    deepest = int(tree.depths_N.max())
    if deepest > LONGEST:
        raise ValueError(
            f"The draft tree is {deepest} drafts deep, expected at most {LONGEST}, because "
            f"recorded answers go on for {LONGEST} tokens after the last round begins; limit its "
            "depth, or decode without replay."
        )


def _now(device: torch.device) -> float:
    """A clock reading after all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
