"""Every exact rule inside the decoder: greedy answers at temperature 0, the law above it."""

import pytest
import torch

from decode.session import Decoder
from decode.tree.chain import Chain
from decode.tree.sampled import Sampled
from decode.verifier.base import Verifier
from decode.verifier.block import Block
from decode.verifier.sampling import Sampling
from decode.verifier.spectr import SpecTr
from decode.verifier.traversal import Traversal
from models.drafter.base import Policy
from models.drafter.medusa import Medusa
from models.target import Target
from tests.decode.test_session import plain_tokens
from tests.decode.toy import PROMPTS, chi_square, echo, text_law
from tests.tiny import tiny_target

T = 1.3


def combinations(temperature: float) -> dict[str, tuple[Verifier, Policy]]:
    common = {"temperature": temperature, "seed": 1}
    return {
        "sampling": (Sampling(), Sampled(widths=[3, 1], **common)),
        "sampling, replacement": (Sampling(), Sampled(widths=[3, 1], replacement=True, **common)),
        "spectr": (SpecTr(), Sampled(widths=[3, 1], replacement=True, **common)),
        "traversal": (Traversal(), Sampled(widths=[2, 2], **common)),
        "traversal, replacement": (Traversal(), Sampled(widths=[2, 2], replacement=True, **common)),
        "block": (Block(), Chain(gamma=2, temperature=temperature, seed=1)),
        "block, greedy draft": (Block(), Chain(gamma=2)),
    }


@pytest.mark.parametrize("name", list(combinations(0.0)))
def test_greedy_answers_do_not_depend_on_the_rule(target: Target, name: str) -> None:
    verifier, policy = combinations(0.0)[name]
    decoder = Decoder(
        target=target, drafter=echo(target, noise=0.7), verifier=verifier, policy=policy
    )
    for prompt in PROMPTS[:3]:
        made = decoder.generate(prompt, max_new_tokens=12, stop_at_eos=False)
        assert made.tokens == plain_tokens(target, prompt, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampling", "spectr", "traversal", "block"])
def test_sampled_answers_have_the_law_of_the_target(name: str) -> None:
    """Counts of whole three-token texts against the exact law of a five-token target."""
    target = tiny_target(3, vocab_size=5)
    head = {"_target_": "models.head.own.OwnHead"}
    torch.manual_seed(0)
    drafter = Medusa(hidden_size=32, vocab_size=5, num_heads=2, draft_vocab_size=4, head=head)
    drafter.bind(target).init_from(target)
    drafter.eval()
    verifier, policy = combinations(T)[name]
    decoder = Decoder(
        target=target, drafter=drafter, verifier=verifier, policy=policy, temperature=T, seed=7
    )
    law, runs = text_law(target, [4, 1], 3, T), 500
    counts = dict.fromkeys(law, 0)
    accepted = 0
    for _ in range(runs):
        made = decoder.generate([4, 1], max_new_tokens=3, stop_at_eos=False)
        counts[tuple(made.tokens)] += 1
        accepted += sum(r.accepted for r in made.rounds)
    statistic, bound = chi_square(list(counts.values()), [runs * p for p in law.values()])
    assert statistic < bound
    assert accepted > runs // 4
