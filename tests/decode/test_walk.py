"""Trees on recorded answers, against the decoder itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.prompts import Prompt
from decode.answers import LONGEST, Recorded, Recording, record
from decode.baselines.prompt_lookup import PromptLookup
from decode.baselines.token_recycling import TokenRecycling
from decode.measure import measure
from decode.replay import Timing, replay
from decode.replay_trees import replay_tree
from decode.session import Decoder, Round
from decode.tree.chain import Chain
from decode.tree.dynamic import Dynamic
from decode.tree.static import StaticTree
from decode.verifier.sampling import Sampling
from decode.walk import check_draft, walk
from models.drafter.base import Children, Drafter, Frontier, Policy
from models.drafter.eagle3 import Eagle3
from models.drafter.sorted_lm import SortedLm
from models.target import Target
from tests.decode.test_replay import LENGTH, PROMPT_SET, make, trained
from tests.decode.toy import echo, text_law
from tests.models.drafter.test_kangaroo import make as kangaroo
from tests.tiny import tiny_target

ACCURACY = [[0.5, 0.2, 0.1], [0.4, 0.25, 0.05], [0.3, 0.1, 0.02]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def ending() -> Target:
    """A target that ends about half of its greedy answers early, at different places."""
    found = tiny_target(seed=3)
    plain = Decoder(target=found, drafter=None, verifier=Sampling(), policy=None)
    texts = [plain.generate(p.tokens, max_new_tokens=LENGTH).tokens for p in PROMPT_SET]
    inside = [t for text in texts for t in set(text[3:])]
    found.model.generation_config.eos_token_id = max(set(inside), key=inside.count)
    return found


def shapes(kind: str) -> list[Policy]:
    chains: list[Policy] = [Chain(gamma=3), StaticTree(nodes=8, accuracy_KR=ACCURACY)]
    deep = 3 if kind in ("medusa", "hydra++") else 6
    return [*chains, Dynamic(nodes=12, depth=deep, top_k=4)]


def sure(target: Target) -> Drafter:
    """A small language model that leaves at its first exit about half of the time."""
    torch.manual_seed(0)
    drafter = SortedLm(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        exits=[1, 3],
        thresholds=[0.5],
        target_config=target.plain_config,
        num_layers=3,
        head={"_target_": "models.head.own.OwnHead"},
    )
    drafter.bind(target).init_from(target)
    return drafter.eval()


def eagle3(target: Target) -> Drafter:
    """Untrained, with the target's head and little of its own, so that it is right now and then."""
    torch.manual_seed(0)
    drafter = Eagle3(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        feature_layers=[1, 2, 3],
        steps=3,
        head={"_target_": "models.head.frozen.FrozenHead"},
    )
    drafter.bind(target).init_from(target)
    return drafter.eval()


MAKERS = {"sorted_lm": sure, "kangaroo": kangaroo, "eagle3": eagle3}


def without_times(rounds: list[Round]) -> list[Round]:
    return [replace(r, draft_s=0.0, target_s=0.0, verify_s=0.0) for r in rounds]


@pytest.mark.parametrize(
    "kind", ["medusa", "hydra++", "causal_lm", "sorted_lm", "echo", "kangaroo", "eagle3"]
)
def test_a_greedy_walk_is_the_decoder(ending: Target, kind: str) -> None:
    """The same rounds one by one: nodes, depth, drafts tested and accepted, tokens produced."""
    recording = record(ending, PROMPT_SET, bench="set", max_new_tokens=LENGTH)
    drafter: Drafter
    if kind == "echo":
        drafter = echo(ending, noise=0.7)
    elif kind in MAKERS:
        drafter = MAKERS[kind](ending)
    else:
        drafter = make(kind, ending, recording)
    beyond = gained = 0
    for policy in shapes(kind):
        decoder = Decoder(target=ending, drafter=drafter, verifier=Sampling(), policy=policy)
        for answer in recording.answers:
            real = decoder.generate(answer.prompt.tokens, max_new_tokens=LENGTH)
            assert real.tokens == answer.tokens[:LENGTH]
            ours = walk(ending, drafter, policy, answer, max_new_tokens=LENGTH)
            assert without_times(ours) == without_times(real.rounds)
            assert all(r.draft_s > 0.0 for r in ours)
            beyond += 1 + sum(r.produced for r in ours) > len(real.tokens)
            gained += sum(r.accepted for r in ours)
    assert gained > (20 if kind != "eagle3" else 0)
    if kind == "echo":
        assert beyond > 0, "no round ran past max_new_tokens, so that case was not compared"
        ends = [a for a in recording.answers if len(a.tokens) < LENGTH]
        inside = [walk(ending, drafter, shapes(kind)[2], a, max_new_tokens=LENGTH) for a in ends]
        assert any(w[-1].produced == w[-1].accepted for w in inside), "no draft ended an answer"
    if isinstance(drafter, SortedLm):
        assert min(drafter.exits_taken) > 0, "all drafts left at one exit"


def test_methods_without_training_are_walked_or_refused(ending: Target) -> None:
    recording = record(ending, PROMPT_SET, bench="set", max_new_tokens=LENGTH)
    lookup = PromptLookup(gamma=4, max_ngram=2).bind(ending)
    decoder = Decoder(target=ending, drafter=lookup, verifier=Sampling(), policy=None)
    gained = 0
    for answer in recording.answers:
        real = decoder.generate(answer.prompt.tokens, max_new_tokens=LENGTH)
        ours = walk(ending, lookup, None, answer, max_new_tokens=LENGTH)
        assert without_times(ours) == without_times(real.rounds)
        gained += sum(r.accepted for r in ours)
    assert gained > 0
    made = replay_tree(target=ending, drafter=lookup, policy=None, recording=recording)
    assert (made.shape, made.draft_bytes) == ("lookup4", 0.0)
    assert made.mbsu == made.tau.value
    with pytest.raises(ValueError, match="learns from what the target says"):
        check_draft(ending, TokenRecycling(nodes=5).bind(ending), None, [5, 6])


class Given(Policy):
    """One tree, whatever is asked: children as (parent node, token), depth by depth."""

    name = "given"

    def __init__(self, *levels: list[tuple[int, int]]) -> None:
        self.levels = levels

    def grow(self, depth: int, frontier: Frontier, logits_ND: Any, drafter: Drafter) -> Any:
        if depth >= len(self.levels):
            return None
        parents, tokens = (torch.tensor(x) for x in zip(*self.levels[depth], strict=True))
        every = torch.ones(len(tokens), dtype=torch.bool)
        return Children(tokens, parents, every.float(), every)


def test_rounds_by_hand(ending: Target) -> None:
    """Root -> 7, 8; 7 -> 9, 10; 10 -> 11. Token 2 ends an answer."""
    policy = Given([(0, 7), (0, 8)], [(0, 9), (0, 10)], [(1, 11)])
    drafter = echo(ending)
    cases = {
        # First token, then: 7 10 11 and bonus 5; 8 and bonus 7 (8 has no child: one depth tested);
        # 9 is no child of the root: bonus; 7 9 and then the end, as a bonus token.
        (1, 7, 10, 11, 5, 8, 7, 9, 7, 9, 2): [(3, 3, 4), (1, 1, 2), (0, 1, 1), (2, 2, 3)],
        # 7 10 and bonus 3: 10 had a child, so three depths were tested.
        (1, 7, 10, 3, 2): [(2, 3, 3), (0, 1, 1)],
    }
    for tokens, wanted in cases.items():
        answer = Recorded(Prompt("a", [5, 6], "x"), list(tokens), [0.0] * len(tokens))
        rounds = walk(ending, drafter, policy, answer, max_new_tokens=100)
        assert [(r.accepted, r.tested, r.produced) for r in rounds] == wanted
        assert {(r.nodes, r.depth) for r in rounds} == {(6, 3)}
    # The end itself accepted, though the draft goes on behind it: nothing more is tested.
    ends = Given([(0, 2), (0, 8)], [(0, 9)])
    answer = Recorded(Prompt("a", [5, 6], "x"), [1, 8, 4, 2], [0.0] * 4)
    rounds = walk(ending, drafter, ends, answer, max_new_tokens=100)
    assert [(r.accepted, r.tested, r.produced) for r in rounds] == [(1, 1, 2), (1, 1, 1)]
    # Cut at 3 tokens the second round is not begun; at 2 the first one overruns, and counts.
    for limit in (2, 3):
        rounds = walk(ending, drafter, ends, answer, max_new_tokens=limit)
        assert [(r.accepted, r.tested, r.produced) for r in rounds] == [(1, 1, 2)]
    assert walk(ending, drafter, ends, answer, max_new_tokens=1) == []


@torch.inference_mode()
def test_sampled_walk_has_the_decoders_law() -> None:
    """Mean rounds and tokens produced over *all* answers of a four-token vocabulary, each with its
    exact probability, against many decodings."""
    target, temperature, length, runs = tiny_target(vocab_size=4), 0.9, 3, 300
    drafter = echo(target, noise=2.0)
    policy = Dynamic(nodes=5, depth=2, top_k=2)
    prompt = Prompt("a", [3, 1], "x")
    target.model.generation_config.eos_token_id = None
    # Answers must go on for two tokens more than asked, because the last round may.
    law = text_law(target, prompt.tokens, length + 1, temperature)
    ends = set(target.eos_ids)
    mean = np.zeros(3)
    found: dict[tuple[int, ...], np.ndarray] = {}
    for text, probability in law.items():
        stop = next((j + 1 for j, t in enumerate(text) if t in ends), len(text))
        if text[:stop] not in found:
            # Padded where a recording would go on: what stands there is never reached.
            more = [] if text[stop - 1] in ends else [0] * LONGEST
            answer = Recorded(prompt, [*text[:stop], *more], [])
            rounds = walk(target, drafter, policy, answer, max_new_tokens=length)
            found[text[:stop]] = counts(rounds)
        mean += probability * found[text[:stop]]
    decoder = Decoder(
        target=target,
        drafter=drafter,
        verifier=Sampling(),
        policy=policy,
        temperature=temperature,
        seed=5,
    )
    real = np.array(
        [counts(decoder.generate(prompt.tokens, max_new_tokens=length).rounds) for _ in range(runs)]
    )
    error = real.std(axis=0) / runs**0.5
    assert (np.abs(real.mean(axis=0) - mean) < 3.5 * error).all(), (real.mean(axis=0), mean, error)
    assert (error < 0.08 * mean).all(), "too few runs to tell"


def counts(rounds: list[Round]) -> np.ndarray:
    return np.array(
        [len(rounds), sum(r.produced for r in rounds), sum(r.accepted for r in rounds)], float
    )


def test_the_results_are_those_of_a_measurement(ending: Target) -> None:
    recording = record(ending, PROMPT_SET, bench="set", max_new_tokens=LENGTH)
    drafter, policy = trained("medusa", ending, recording), Dynamic(nodes=9, depth=3, top_k=3)
    common: dict[str, Any] = {"target": ending, "drafter": drafter, "policy": policy}
    progress: list[tuple[int, float]] = []
    timing = Timing(1.0, 6.0, 1.0, 5.0)
    ours = replay_tree(
        **common,
        recording=recording,
        timing=timing,
        on_prompt=lambda done, tau: progress.append((done, tau)),
    )
    real = measure(
        **common,
        verifier=Sampling(),
        prompts=PROMPT_SET,
        max_new_tokens=LENGTH,
        baseline=False,
    )
    for name in (
        "prompts", "tokens", "rounds", "max_new_tokens", "shape", "tau", "tau_by_category",
        "alpha_by_depth", "reached_by_depth", "nodes_per_round", "mbsu", "draft_bytes",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(real, name), name
    assert progress[-1] == (len(PROMPT_SET), pytest.approx(real.tau.value))
    assert ours.break_even_tau == pytest.approx(1.6)
    assert ours.speedup is not None
    assert ours.speedup.value == pytest.approx(real.tau.value / 1.6)
    assert ours.drafting_ms > 0.0


def test_several_answers_of_a_prompt_are_one_record(ending: Target) -> None:
    """Greedy chains at T: trees and chains replay the same rounds of the same answers."""
    recording = record(
        ending, PROMPT_SET[:3], bench="set", max_new_tokens=8, temperature=0.8, samples=4
    )
    drafter = trained("hydra++", ending, recording)
    ours = replay_tree(target=ending, drafter=drafter, policy=Chain(gamma=3), recording=recording)
    chain = replay(
        target=ending, drafter=drafter, recording=recording, gammas=[3], draft_temperature=0.0
    ).chain(3)
    assert (ours.prompts, ours.samples, len(ours.records)) == (3, 4, 3)
    assert ours.tau == chain.tau
    for mine, its in zip(ours.records, chain.records, strict=True):
        assert (mine.rounds, mine.produced, mine.new_tokens) == (
            its.rounds,
            its.produced,
            its.new_tokens,
        )
        assert mine.tested_by_depth == its.tested_by_depth


def test_what_a_walk_cannot_follow_is_refused(ending: Target) -> None:
    drafter = echo(ending)
    with pytest.raises(ValueError, match="drafts are sampled"):
        check_draft(ending, drafter, Chain(gamma=2, temperature=1.0), [5])
    with pytest.raises(ValueError, match="9 drafts deep"):
        check_draft(ending, drafter, Chain(gamma=LONGEST + 1), [5, 6])
    check_draft(ending, drafter, Chain(gamma=LONGEST), [5, 6])
    recording = Recording("set", 1.0, 4, 0, 1, [Recorded(Prompt("a", [5], "x"), [3, 4], [])])
    with pytest.raises(ValueError, match="drafts are sampled"):
        replay_tree(
            target=ending,
            drafter=drafter,
            policy=Chain(gamma=2, temperature=1.0),
            recording=recording,
        )
