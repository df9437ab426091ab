"""Every tree with a real family: greedy answers, and the law of sampled ones.

A deterministic tree is verified with q one-hot; `tests/decode/test_verifier.py` enumerates that
rule for fixed trees, this file for trees a policy grows out of a draft.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decode.session import Decoder
from decode.tree.beam import Beam
from decode.tree.dynamic import Dynamic
from decode.tree.dyspec import DySpec
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from models.drafter.base import Policy
from models.drafter.hydra_heads import HydraHeads
from models.target import Target
from tests.decode.toy import PROMPTS, Scripted, chi_square, law_error, tables, text_law
from tests.decode.tree.table import Path, Table, grown, paths_of, random_table
from tests.tiny import tiny_target

POLICIES: dict[str, Callable[[int], Policy]] = {
    "dynamic": lambda nodes: Dynamic(nodes=nodes, depth=5, top_k=3),
    "beam": lambda nodes: Beam(width=nodes // 3, depth=3),
    "dyspec": lambda nodes: DySpec(nodes=nodes, depth=3),
}
"""Each policy with about this many nodes and at most three children a node."""


def hydra(target: Target, *, heads: int, draft_vocab: int | None = None) -> HydraHeads:
    """Hydra heads that were fitted to nothing: the target's own vocabulary rows, random blocks."""
    torch.manual_seed(0)
    drafter = HydraHeads(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        head={"_target_": "models.head.own.OwnHead"},
        num_heads=heads,
        draft_vocab_size=draft_vocab,
    )
    if draft_vocab is not None:
        drafter.set_vocab(torch.arange(draft_vocab))
    drafter.bind(target)
    drafter.init_from(target)
    return drafter.eval()


def fit(drafter: HydraHeads, target: Target, tokens: list[int]) -> None:
    """Learn one text by heart, so that some drafts are accepted."""
    tokens_BT = torch.tensor([tokens])
    features = target.forward(tokens_BT)
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(60):
        losses = [
            torch.nn.functional.cross_entropy(
                depth.head(depth.states_BNd[0, : -1 - depth.shift]), tokens_BT[0, 1 + depth.shift :]
            )
            for depth in drafter.unroll(features, tokens_BT)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", list(POLICIES))
def test_greedy_answers_are_the_targets_own(shape: str, target: Target) -> None:
    plain = Decoder(target=target, drafter=None, verifier=Greedy(), policy=None)
    truth = [plain.generate(p, max_new_tokens=20, stop_at_eos=False).tokens for p in PROMPTS]
    drafter = hydra(target, heads=3)
    fit(drafter, target, [*PROMPTS[0], *truth[0]])
    ours = Decoder(target=target, drafter=drafter, verifier=Sampling(), policy=POLICIES[shape](12))
    rounds = []
    for prompt, tokens in zip(PROMPTS, truth, strict=True):
        made = ours.generate(prompt, max_new_tokens=20, stop_at_eos=False)
        assert made.tokens == tokens
        rounds += made.rounds
    assert sum(r.accepted for r in rounds) >= 6, "nothing was drafted right"
    assert max(r.depth for r in rounds) > 1
    assert all(1 < r.nodes <= 14 and r.depth <= 3 for r in rounds)


@pytest.mark.parametrize("shape", list(POLICIES))
@pytest.mark.parametrize("seed", [1, 2])
def test_the_law_is_kept_by_enumeration(shape: str, seed: int) -> None:
    vocab = 4
    q: Callable[[Path], Tensor] = random_table(seed, vocab)
    tree = grown(Table(q, vocab=vocab, limit=3), POLICIES[shape](6))
    texts, p = paths_of(tree), tables(seed + 10, vocab, 4)

    def round_(chance: Scripted) -> tuple:
        verdict = Sampling().verify(tree, lambda node: p[texts[node]], chance)
        return (*texts[verdict.path[-1]], verdict.token)

    assert max(len(text) for text in texts) > 1
    assert law_error(p, vocab, 4, round_) < 1e-12


@pytest.mark.parametrize("shape", [*POLICIES, "dyspec, sampled"])
def test_sampled_answers_have_the_targets_law(shape: str) -> None:
    small = tiny_target(3, vocab_size=5)
    temperature, runs, length = 1.3, 200, 3
    if shape in POLICIES:
        policy = POLICIES[shape](6)
    else:
        policy = DySpec(nodes=6, depth=2, temperature=temperature, seed=1)
    decoder = Decoder(
        target=small,
        drafter=hydra(small, heads=2, draft_vocab=4),
        verifier=Sampling(),
        policy=policy,
        temperature=temperature,
        seed=7,
    )
    law = text_law(small, [4, 1], length, temperature)
    counts, accepted = dict.fromkeys(law, 0), 0
    for _ in range(runs):
        made = decoder.generate([4, 1], max_new_tokens=length, stop_at_eos=False)
        counts[tuple(made.tokens)] += 1
        accepted += sum(r.accepted for r in made.rounds)
    statistic, bound = chi_square(list(counts.values()), [runs * x for x in law.values()])
    assert statistic < bound
    assert accepted > runs // 4
