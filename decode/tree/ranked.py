"""The drafter's best tokens with their log-probabilities, for trees that are grown by score.

Shape legend: N frontier nodes, R ranks, D draft vocabulary.
"""

from torch import Tensor


def ranked(logits_ND: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """log q `[N, R]` of each row's `ranks` best draft tokens, best first, and their draft ids.

    q is the softmax over the draft vocabulary at temperature 1. log q never exceeds 0, in floating
    point as well (log-sum-exp is the maximum plus something that is not negative), so that a score
    added up along a path never rises.
    """
    logits_ND = logits_ND.float()
    top_NR, drafted_NR = logits_ND.topk(ranks, dim=-1)
    return top_NR - logits_ND.logsumexp(-1, keepdim=True), drafted_NR


def best_first(scores_M: Tensor, count: int) -> Tensor:
    """Places of the `count` largest scores (of all, if there are fewer), largest first.

    Among equals the earlier one comes first. A child stands after its parent and never scores
    more, so what is taken by this order holds every parent of what it holds.
    """
    return scores_M.sort(descending=True, stable=True).indices[:count]


def check_ranks(name: str, ranks: int, vocabulary: int) -> None:
    """Refuse more children a node than the draft vocabulary has tokens."""
    if ranks > vocabulary:
        raise ValueError(
            f"{name}={ranks} asks for more drafts of a node than the draft vocabulary has tokens "
            f"({vocabulary}), and siblings must differ; set {name}={vocabulary} or less."
        )
