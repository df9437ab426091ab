"""Medusa's typical acceptance (Cai et al., 2024, arXiv 2401.10774, section 2.3.1). Lossy.

Shape legend: V vocabulary.
"""

import math

import torch

from decode.chance import Chance
from decode.verifier.base import TargetLaw, Verdict, children_of
from models.drafter.base import Tree


class Typical:
    """Keep any draft that the target finds plausible enough; the output law is not the target's.

    Rule: a child x of an accepted node is accepted when

        p(x) > min(epsilon, delta * exp(-H(p)))

    with H the entropy of p in nats: a confident target wants a likely token, an undecided one is
    content with less. The longest accepted path wins, ties by its log-likelihood; the bonus token
    is drawn from p at its end. Deviation from the released code: H is exact, without 1e-5 in the
    log.
    """

    lossy = True
    greedy_only = False

    def __init__(self, *, epsilon: float = 0.09, delta: float = 0.3, lossy: bool = False) -> None:
        if not lossy:
            raise ValueError(
                "Typical acceptance changes the distribution of the output, so numbers made with "
                "it are not those of lossless decoding, and it was asked for with lossy=false; set "
                "verifier.lossy=true to say that you want it, or use verifier=sampling."
            )
        self.epsilon = epsilon
        self.delta = delta

    def verify(self, tree: Tree, p: TargetLaw, chance: Chance) -> Verdict:
        """Follow every accepted path; nodes come after their parents, so one sweep is enough."""
        children, tokens = children_of(tree), tree.tokens_N.tolist()
        paths: dict[int, tuple[list[int], float]] = {0: ([0], 0.0)}
        for node in range(len(tree)):
            if node not in paths or not children[node]:
                continue
            path, likelihood = paths[node]
            p_V = p(node)
            entropy = float(torch.special.entr(p_V).sum())
            bar = min(self.epsilon, self.delta * math.exp(-entropy))
            for child in children[node]:
                probability = float(p_V[tokens[child]])
                if probability > bar:
                    paths[child] = ([*path, child], likelihood + math.log(probability))
        best, _ = max(paths.values(), key=lambda found: (len(found[0]), found[1]))
        return Verdict(best, chance.draw(p(best[-1])))
