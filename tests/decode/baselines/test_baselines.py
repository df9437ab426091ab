"""Every method without training, in the decoder: exact, and counted like a drafter."""

from collections.abc import Callable

import pytest

from decode.baselines.base import Baseline
from decode.baselines.prompt_lookup import PromptLookup
from decode.baselines.token_recycling import TokenRecycling
from decode.session import Decoder
from decode.verifier.base import Verifier
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from models.target import Target
from tests.decode.toy import PROMPTS, chi_square, text_law
from tests.tiny import tiny_target

MAKERS: dict[str, Callable[[], Baseline]] = {
    "prompt_lookup": lambda: PromptLookup(gamma=4),
    "token_recycling": lambda: TokenRecycling(nodes=20, depth=4, successors=4),
}
VERIFIERS: dict[str, Callable[[], Verifier]] = {"greedy": Greedy, "sampling": Sampling}


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Callable[[], Baseline]:
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def target() -> Target:
    """Few tokens: its answers repeat themselves, so that there is something to draft."""
    return tiny_target(3, vocab_size=12)


def prompts() -> list[list[int]]:
    return [[token % 12 for token in prompt] for prompt in PROMPTS]


def decoder(target: Target, baseline: Baseline | None, verifier: Verifier, **how) -> Decoder:
    return Decoder(target=target, drafter=baseline, verifier=verifier, policy=None, **how)


@pytest.mark.parametrize("verifier", list(VERIFIERS))
def test_greedy_answers_are_those_of_plain_decoding(
    target: Target, make: Callable[[], Baseline], verifier: str
) -> None:
    ours = decoder(target, make().bind(target), VERIFIERS[verifier]())
    plain = decoder(target, None, Greedy())
    accepted = refused = 0
    for prompt in prompts() * 2:  # the second time a matrix knows the answers
        made = ours.generate(prompt, max_new_tokens=60, stop_at_eos=False)
        assert made.tokens == plain.generate(prompt, max_new_tokens=60, stop_at_eos=False).tokens
        assert sum(r.produced for r in made.rounds) >= len(made.tokens) - 1
        accepted += sum(r.accepted for r in made.rounds)
        refused += sum(r.accepted < r.depth for r in made.rounds)
    assert accepted > 20
    assert refused > 20


@pytest.mark.parametrize("place", [1, 3, 6])
def test_an_end_token_ends_the_answer(
    target: Target,
    make: Callable[[], Baseline],
    monkeypatch: pytest.MonkeyPatch,
    place: int,
) -> None:
    whole = decoder(target, None, Greedy()).generate(
        prompts()[3], max_new_tokens=10, stop_at_eos=False
    )
    place = whole.tokens.index(whole.tokens[place])
    monkeypatch.setattr(Target, "eos_ids", property(lambda self: (whole.tokens[place],)))
    ours = decoder(target, make().bind(target), Greedy())
    for _ in range(2):
        made = ours.generate(prompts()[3], max_new_tokens=10)
        assert made.tokens == whole.tokens[: place + 1]
        assert made.finish_reason == "eos"


def test_sampling_keeps_the_law_of_the_target(make: Callable[[], Baseline]) -> None:
    """Counts of whole three-token texts against the exact law of a five-token target."""
    target = tiny_target(3, vocab_size=5)
    temperature, runs, length, prompt = 1.3, 700, 3, [4, 1, 4, 2, 1, 4]
    ours = decoder(target, make().bind(target), Sampling(), temperature=temperature, seed=11)
    law = text_law(target, prompt, length, temperature)
    counts = dict.fromkeys(law, 0)
    accepted = refused = 0
    for _ in range(runs):
        made = ours.generate(prompt, max_new_tokens=length, stop_at_eos=False)
        counts[tuple(made.tokens)] += 1
        accepted += sum(r.accepted for r in made.rounds)
        refused += sum(r.accepted < r.depth for r in made.rounds)
    statistic, bound = chi_square(list(counts.values()), [runs * p for p in law.values()])
    assert statistic < bound
    assert accepted > 100
    assert refused > 100
