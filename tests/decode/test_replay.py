"""Replay against the decoder itself, which it must agree with number by number."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.prompts import Prompt
from decode.answers import LONGEST, Recording, record
from decode.interval import sum_by_depth
from decode.measure import measure
from decode.replay import Timing, replay, time_chains
from decode.rounds import acceptance, expected_counts
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.sampling import Sampling
from models.drafter.base import Depth, Drafter, Frontier
from models.drafter.hydra_heads import HydraHeads
from models.drafter.medusa import Medusa
from models.head import Head
from models.head.frozen import FrozenHead
from models.target import Features, Target
from tests.decode.toy import PROMPTS
from tests.models.drafter.test_causal_lm import small_lm
from tests.tiny import tiny_target

HEAD = {"_target_": "models.head.own.OwnHead"}
PROMPT_SET = [
    Prompt(f"set/{i}", tokens, "even" if i % 2 == 0 else "odd")
    for i, tokens in enumerate([*PROMPTS, [7, 7], [250, 11, 60], [19], [33, 34, 35, 36, 37]])
]
LENGTH = 24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def ending() -> Target:
    """A target that ends about half of its greedy answers early, at different places."""
    found = tiny_target(seed=3)
    plain = Decoder(target=found, drafter=None, verifier=Sampling(), policy=None)
    texts = [plain.generate(p.tokens, max_new_tokens=LENGTH).tokens for p in PROMPT_SET]
    inside = [t for text in texts for t in set(text[3:])]
    found.model.generation_config.eos_token_id = max(set(inside), key=inside.count)
    return found


class Twin(Drafter):
    """A recurrent drafter that reads tokens only: the target's stack, disturbed. Slow."""

    reads_features = False

    def __init__(self, *, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size=hidden_size, vocab_size=vocab_size)
        self.frozen = FrozenHead(hidden_size=hidden_size, vocab_size=vocab_size)
        self.noise_d = torch.nn.Parameter(torch.zeros(hidden_size))

    @property
    def num_depths(self) -> int:
        return 1

    @property
    def max_depth(self) -> None:
        return None

    def head(self, depth: int) -> Head:
        return self.frozen

    def _states(self, tokens_BT: Tensor) -> Tensor:
        return self.target.forward(tokens_BT).final_BTd * (1.0 + self.noise_d)

    def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
        assert features.final_BTd.shape[-1] == 0, "the target ran for nothing"
        yield Depth(self._states(tokens_BT), self.frozen, shift=0)

    def start(self, features: Features, tokens_1T: Tensor) -> Tensor:
        return tokens_1T

    def extend(self, state: Any, features: Features, tokens_1N: Tensor) -> Tensor:
        return torch.cat([state, tokens_1N], dim=1)

    def step(self, state: Any, depth: int, frontier: Frontier) -> tuple[Any, Tensor]:
        text = state if depth == 0 else torch.cat([state, frontier.tokens_N[:, None]], dim=1)
        return text, self._states(text)[:, -1]


def twin(target: Target, noise: float = 0.4) -> Drafter:
    drafter = Twin(hidden_size=target.hidden_size, vocab_size=target.vocab_size)
    torch.manual_seed(1)
    drafter.noise_d.data = noise * torch.randn(target.hidden_size)
    return drafter.bind(target).eval()


def trained(kind: str, target: Target, recording: Recording, vocab: int | None = None) -> Drafter:
    """Heads fitted for a moment to the recorded answers, so that they are right now and then."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "num_heads": 3,
        "draft_vocab_size": vocab,
        "head": HEAD,
    }
    drafter: Drafter
    if kind == "medusa":
        drafter = Medusa(**sizes)
    else:
        shape = target.layer_shape
        drafter = HydraHeads(target_shape=shape, prefix_layer=kind == "hydra++", **sizes)
    if vocab is not None:
        drafter.set_vocab(torch.arange(vocab) * (target.vocab_size // vocab))
    drafter.bind(target).init_from(target)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=0.01)
    texts = [torch.tensor([a.text]) for a in recording.answers[::2]]
    for _ in range(8):
        for tokens in texts:
            loss = torch.zeros(())
            for view in drafter.unroll(target.forward(tokens), tokens):
                logits = view.head(view.states_BNd[0, : -view.shift - 1])
                label = tokens[0, view.shift + 1 :]
                if drafter.draft_ids_D is not None:
                    hits = drafter.draft_ids_D[None] == label[:, None]
                    logits, label = logits[hits.any(-1)], hits.int().argmax(-1)[hits.any(-1)]
                loss = loss + F.cross_entropy(logits, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return drafter.eval()


def make(kind: str, target: Target, recording: Recording) -> Drafter:
    if kind == "twin":
        return twin(target)
    if kind == "causal_lm":
        return small_lm(target, num_layers=3, draft_vocab_size=200)
    return trained(kind.partition("-")[0], target, recording, 80 if "-" in kind else None)


@pytest.mark.parametrize(
    "kind", ["medusa", "hydra", "hydra++", "medusa-reduced", "twin", "causal_lm"]
)
def test_greedy_replay_is_the_decoder(ending: Target, kind: str) -> None:
    """Rounds, tokens produced, and tests and acceptances by depth, prompt by prompt."""
    recording = record(ending, PROMPT_SET, bench="set", max_new_tokens=LENGTH)
    drafter = make(kind, ending, recording)
    gammas = [1, 2, 3] if kind not in ("twin", "causal_lm") else [1, 2, 3, 5, 8]
    made = replay(target=ending, drafter=drafter, recording=recording, gammas=gammas)
    inner = 0
    for gamma in gammas:
        real = measure(
            target=ending,
            drafter=drafter,
            policy=Chain(gamma=gamma),
            verifier=Sampling(),
            prompts=PROMPT_SET,
            max_new_tokens=LENGTH,
            baseline=False,
        )
        ours = made.chain(gamma)
        for mine, its in zip(ours.records, real.records, strict=True):
            assert (mine.id, mine.new_tokens) == (its.id, its.new_tokens)
            assert (mine.rounds, mine.produced) == (its.rounds, its.produced)
            assert mine.tested_by_depth == its.tested_by_depth
            assert mine.accepted_by_depth == its.accepted_by_depth
            inner += its.produced > its.new_tokens - 1
        assert ours.tau == real.tau
        assert ours.tau_by_category == real.tau_by_category
        assert ours.alpha_by_depth == pytest.approx(real.alpha_by_depth)
        assert ours.mbsu == pytest.approx(real.mbsu)
        assert 1.05 < ours.tau.value < gamma + 1
    ended = [len(a.tokens) < LENGTH for a in recording.answers]
    assert any(ended)
    assert not all(ended)
    if kind == "twin":
        assert inner > 0, "no round ran past max_new_tokens, so that case was not compared"


def test_an_end_of_answer_inside_a_draft_by_hand() -> None:
    """Five tokens, the last one ends the answer; gamma 3; the chances are certainties."""
    accept_KAJ = np.zeros((3, 1, 5))
    accept_KAJ[0, 0, [1, 3]] = 1.0  # first drafts of rounds that begin at 1 and at 3
    accept_KAJ[1, 0, 4] = 1.0  # second draft of the round that begins at 3: the end itself
    (counts,) = expected_counts(accept_KAJ, [5], gamma=3, max_new_tokens=20)
    # Round 1 begins at 1: draft 0 passes, draft 1 (token 2) fails: 2 tokens, next at 3.
    # Round 2 begins at 3: both pass, the second is the end: 2 tokens, nothing more is tested.
    assert counts == {
        "rounds": 2.0,
        "produced": 4.0,
        "tested_by_depth": [2.0, 2.0],
        "accepted_by_depth": [2.0, 1.0],
    }
    # Cut at 3 tokens: the round at 3 is not begun. Cut at 2: the round at 1 overruns, and counts.
    (counts,) = expected_counts(accept_KAJ, [5], gamma=3, max_new_tokens=3)
    assert (counts["rounds"], counts["produced"]) == (1.0, 2.0)
    (counts,) = expected_counts(accept_KAJ, [5], gamma=3, max_new_tokens=1)
    assert (counts["rounds"], counts["produced"], counts["tested_by_depth"]) == (0.0, 0.0, [])


def walk(accept_KJ: np.ndarray, n: int, gamma: int, limit: int, random: Random) -> dict[str, Any]:
    """One draw of the decoder's rounds along an answer: the coins of the derivation, flipped."""
    rounds = produced = 0
    tested, accepted = [0.0] * gamma, [0.0] * gamma
    i = 1
    while i < min(n, limit):
        rounds += 1
        k = 0
        while k < gamma:
            tested[k] += 1
            if random.random() >= accept_KJ[k, i + k]:
                break
            accepted[k] += 1
            k += 1
            if i + k == n:  # accepted token i+k-1 was the last one
                produced -= 1
                break
        produced += k + 1
        i += k + 1
    return {"rounds": rounds, "produced": produced, "tested": tested, "accepted": accepted}


def test_expected_counts_are_the_mean_of_coins() -> None:
    rng = np.random.default_rng(0)
    lengths, gamma, limit, draws = [3, 9, 12 + LONGEST], 3, 12, 20_000
    accept_KAJ = rng.random((gamma, 3, max(lengths)))
    expected = expected_counts(accept_KAJ, lengths, gamma=gamma, max_new_tokens=limit)
    random = Random(0)
    for a, n in enumerate(lengths):
        runs = [walk(accept_KAJ[:, a], n, gamma, limit, random) for _ in range(draws)]
        for name in ("rounds", "produced"):
            values = np.array([r[name] for r in runs])
            error = values.std() / draws**0.5
            assert abs(values.mean() - expected[a][name]) < 4 * error + 1e-9
        for name in ("tested", "accepted"):
            mean_K = np.mean([r[name] for r in runs], axis=0)
            wanted_K = sum_by_depth([expected[a][f"{name}_by_depth"], [0.0] * gamma])
            assert np.abs(mean_K - wanted_K).max() < 4 * limit**0.5 / draws**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "drafts_at"), [("hydra", None), ("causal_lm", None), ("twin", 0.0)]
)
def test_sampled_replay_agrees_with_the_decoder(
    ending: Target, kind: str, drafts_at: float | None
) -> None:
    """Mean rounds and tokens produced of many real decodings, within three standard errors."""
    prompts, gamma, length, samples, temperature = PROMPT_SET[:2], 3, 8, 250, 0.7
    greedy = record(ending, PROMPT_SET, bench="set", max_new_tokens=LENGTH)
    drafter = make(kind, ending, greedy)
    recording = record(
        ending,
        prompts,
        bench="set",
        max_new_tokens=length,
        temperature=temperature,
        samples=samples,
    )
    ours = replay(
        target=ending,
        drafter=drafter,
        recording=recording,
        gammas=[gamma],
        draft_temperature=drafts_at,
    ).chain(gamma)
    accept_KAJ = acceptance(
        ending,
        drafter,
        recording,
        depths=gamma,
        draft_temperature=temperature if drafts_at is None else drafts_at,
    )
    lengths = [len(a.tokens) for a in recording.answers]
    counts = expected_counts(accept_KAJ, lengths, gamma=gamma, max_new_tokens=length)
    policy = Chain(gamma=gamma, temperature=temperature if drafts_at is None else drafts_at)
    decoder = Decoder(
        target=ending,
        drafter=drafter,
        verifier=Sampling(),
        policy=policy,
        temperature=temperature,
        seed=11,
    )
    for which, prompt in enumerate(prompts):
        runs = [
            decoder.generate(prompt.tokens, max_new_tokens=length).rounds for _ in range(samples)
        ]
        own = counts[which * samples : (which + 1) * samples]
        for name, real in (
            ("rounds", np.array([len(r) for r in runs])),
            ("produced", np.array([sum(x.produced for x in r) for r in runs])),
            ("accepted", np.array([sum(x.accepted for x in r) for r in runs])),
        ):
            mine = np.array([c[name] if name in c else sum(c["accepted_by_depth"]) for c in own])
            error = (real.var() / samples + mine.var() / samples) ** 0.5
            assert abs(real.mean() - mine.mean()) < 3 * error + 1e-9, name
        assert ours.records[which].rounds == pytest.approx(sum(c["rounds"] for c in own))


@torch.no_grad()
def test_acceptance_is_the_ratio_of_probabilities(ending: Target) -> None:
    """a_0 by hand, from full softmaxes of the twin and the target over one text."""
    recording = record(
        ending, PROMPT_SET[:1], bench="set", max_new_tokens=10, temperature=0.9, seed=2
    )
    drafter, answer = twin(ending), recording.answers[0]
    found_KAJ = acceptance(ending, drafter, recording, depths=2, draft_temperature=0.9)
    tokens = torch.tensor([answer.text])
    p_TV = (ending.project(ending.forward(tokens).final_BTd[0]) / 0.9).softmax(-1)
    view = next(iter(drafter.unroll(Features(torch.empty(1, 0, 0)), tokens)))
    q_TV = (view.head(view.states_BNd[0]) / 0.9).softmax(-1)
    start = len(answer.prompt.tokens)
    for j in range(1, len(answer.tokens)):
        y, at = answer.tokens[j], start + j - 1
        wanted = min(1.0, float(q_TV[at, y] / p_TV[at, y]))
        assert found_KAJ[0, 0, j] == pytest.approx(wanted, rel=1e-4)
        assert found_KAJ[1, 0, j] == (found_KAJ[0, 0, j] if j > 1 else 0.0)


def test_a_perfect_drafter_is_always_accepted(ending: Target) -> None:
    for temperature in (0.0, 0.8):
        recording = record(
            ending, PROMPT_SET, bench="set", max_new_tokens=LENGTH, temperature=temperature
        )
        made = replay(
            target=ending, drafter=twin(ending, 0.0), recording=recording, gammas=[4]
        ).chain(4)
        assert made.alpha_by_depth == pytest.approx([1.0] * 4, abs=1e-4)


def test_the_prediction_is_tau_over_break_even(ending: Target) -> None:
    recording = record(ending, PROMPT_SET, bench="set", max_new_tokens=LENGTH)
    drafter = twin(ending)
    timings = {1: Timing(1.0, 4.0, 0.0, 4.0), 4: Timing(4.0, 4.0, 0.4, 4.0)}
    made = replay(
        target=ending, drafter=drafter, recording=recording, gammas=[1, 4], timings=timings
    )
    for gamma, even in ((1, 1.25), (4, 2.1)):
        chain = made.chain(gamma)
        assert chain.break_even_tau == pytest.approx(even)
        assert chain.speedup is not None
        assert chain.speedup.value == pytest.approx(chain.tau.value / even)
        assert chain.speedup.low == pytest.approx(chain.tau.low / even)
    speeds = {c.gamma: c.speedup.value for c in made.chains if c.speedup}
    assert made.best_gamma == max(speeds, key=lambda g: speeds[g])
    timed = time_chains(target=ending, drafter=drafter, gammas=[1, 2], prompts=PROMPT_SET[:1])
    assert timed[2].draft_ms > timed[1].draft_ms > 0.0


def test_what_cannot_be_replayed_is_refused(ending: Target) -> None:
    recording = record(ending, PROMPT_SET[:1], bench="set", max_new_tokens=6)
    drafter = trained("medusa", ending, recording)
    with pytest.raises(ValueError, match="chain lengths from 1 to 3"):
        replay(target=ending, drafter=drafter, recording=recording, gammas=[2, 4])
    with pytest.raises(ValueError, match=f"from 1 to {LONGEST}"):
        replay(target=ending, drafter=twin(ending), recording=recording, gammas=[LONGEST + 1])
    sure = twin(ending)
    sure.thresholds = [0.9]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="first exit that is sure enough"):
        replay(target=ending, drafter=sure, recording=recording, gammas=[1])
    with pytest.raises(ValueError, match="samples=2"):
        record(ending, PROMPT_SET[:1], bench="set", max_new_tokens=6, samples=2)
    with pytest.raises(ValueError, match="512 positions"):
        record(ending, PROMPT_SET[:1], bench="set", max_new_tokens=509)
    with pytest.raises(ValueError, match="no prompt to record"):
        record(ending, [], bench="set", max_new_tokens=6)

    class Sparse(Medusa):
        def unroll(self, features: Features, tokens_BT: Tensor) -> Iterator[Depth]:
            for view in super().unroll(features, tokens_BT):
                at = torch.arange(view.states_BNd.shape[1])[None]
                yield replace(view, positions_BN=at)

    drafter.__class__ = Sparse
    with pytest.raises(ValueError, match="leaves out positions"):
        replay(target=ending, drafter=drafter, recording=recording, gammas=[1])
