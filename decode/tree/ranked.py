"""The drafter's best tokens with their log-probabilities, for trees that are grown by score.

Shape legend: N frontier nodes, R ranks, M scores, D draft vocabulary.
"""

import torch
from torch import Tensor

from models.tree import Tree


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


def keep_best(tree: Tree, scores: list[Tensor], nodes: int) -> Tree:
    """The root and its `nodes` - 1 best descendants, whose scores are given in tree order."""
    if not scores:
        return tree
    best = best_first(torch.cat(scores), nodes - 1).sort().values
    # The scores leave out the root: the first of them is node 1.
    return tree.keep(torch.cat([best.new_zeros(1), best + 1]))


def check_ranks(name: str, ranks: int, vocabulary: int) -> None:
    """Refuse more children a node than the draft vocabulary has tokens."""
    if ranks > vocabulary:
        raise ValueError(
            f"{name}={ranks} asks for more drafts of a node than the draft vocabulary has tokens "
            f"({vocabulary}), and siblings must differ; set {name}={vocabulary} or less."
        )
