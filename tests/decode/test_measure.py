import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from decode.bandwidth import count_reads, target_bytes
from decode.baselines.prompt_lookup import PromptLookup
from decode.baselines.token_recycling import TokenRecycling
from decode.interval import bootstrap, tau_parts
from decode.measure import measure
from decode.measurement import Measurement, PromptRecord, _speed_parts
from decode.prompts import Prompt
from decode.report import caption, table, write
from decode.session import Decoder
from decode.tree.chain import Chain
from decode.verifier.greedy import Greedy
from decode.verifier.sampling import Sampling
from models.drafter.hydra_heads import HydraHeads
from models.drafter.medusa import Medusa
from models.target import Target
from tests.decode.toy import PROMPTS, echo

PROMPT_SET = [
    Prompt(f"set/{i}", tokens, "even" if i % 2 == 0 else "odd") for i, tokens in enumerate(PROMPTS)
]
HEAD = {"_target_": "models.head.own.OwnHead"}
RECORD = PromptRecord(
    id="a",
    category=None,
    new_tokens=9,
    rounds=4,
    produced=8,
    nodes=20,
    tested_by_depth=[4, 3, 1],
    accepted_by_depth=[3, 1, 0],
    prefill_s=0.0,
    draft_s=0.1,
    target_s=0.8,
    verify_s=0.1,
    total_s=1.0,
    plain_new_tokens=9,
    plain_total_s=2.0,
)


@pytest.fixture(scope="module")
def measured(target: Target) -> Measurement:
    """A chain of 3 with a drafter that is right often, 25 tokens a prompt."""
    return measure(
        target=target,
        drafter=echo(target, noise=0.7),
        policy=Chain(gamma=3),
        verifier=Greedy(),
        prompts=PROMPT_SET,
        max_new_tokens=25,
    )


def test_ratios_of_sums_by_hand() -> None:
    slow = replace(RECORD, rounds=6, produced=6, plain_total_s=1.0)
    assert bootstrap([RECORD], tau_parts).value == 2.0
    tau = bootstrap([RECORD, slow], tau_parts)
    assert tau.value == 14 / 10  # a ratio of sums, not the mean 1.5 of ratios
    assert (tau.low, tau.high) == (1.0, 2.0)
    speed = bootstrap([RECORD, slow], _speed_parts)
    assert speed.value == pytest.approx(3.0 / 2.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(100):
        produced = 1 + torch.randint(0, 3, (40, 10), generator=generator)
        records = [replace(RECORD, produced=int(p.sum()), rounds=10) for p in produced]
        interval = bootstrap(records, tau_parts)
        covered += interval.low <= 2.0 <= interval.high
    assert 86 <= covered <= 100


def test_counts_are_consistent(measured: Measurement) -> None:
    m = measured
    assert m.prompts == 4
    assert m.tau.value == pytest.approx(sum(r.produced for r in m.records) / m.rounds)
    # tau = 1 + sum over depths of the chance to get there, when no answer ended early.
    reach, total = 1.0, 1.0
    for alpha in m.alpha_by_depth:
        reach *= alpha
        total += reach
    assert total == pytest.approx(m.tau.value, rel=0.05)
    assert m.reached_by_depth[0] == m.rounds
    for k in range(1, len(m.alpha_by_depth)):
        accepted_above = m.alpha_by_depth[k - 1] * m.reached_by_depth[k - 1]
        assert m.reached_by_depth[k] == pytest.approx(accepted_above)
    assert set(m.tau_by_category) == {"even", "odd"}
    assert m.nodes_per_round == 4.0
    assert m.tau.low <= m.tau.value <= m.tau.high
    assert 1.0 < m.tau.value < 4.0


def test_break_even_is_where_the_speeds_meet(measured: Measurement) -> None:
    m = measured
    assert m.plain_ms is not None
    assert m.break_even_tau is not None
    round_ms = m.draft_ms + m.target_ms + m.verify_ms
    assert round_ms / m.break_even_tau == pytest.approx(m.plain_ms)
    assert m.plain_tokens_per_s is not None
    assert m.speedup is not None
    assert m.speedup.value == pytest.approx(m.tokens_per_s / m.plain_tokens_per_s)


def test_without_a_baseline_nothing_is_said_about_speed(target: Target) -> None:
    m = measure(
        target=target,
        drafter=echo(target),
        policy=Chain(gamma=1),
        verifier=Greedy(),
        prompts=PROMPT_SET[:1],
        max_new_tokens=9,
        baseline=False,
    )
    assert m.tau.value == 2.0
    assert m.alpha_by_depth == [1.0]
    assert (m.speedup, m.break_even_tau, m.plain_ms) == (None, None, None)
    assert m.tau_by_category == {}


def test_a_measurement_repeats_itself_when_sampling(target: Target) -> None:
    runs = [
        measure(
            target=target,
            drafter=echo(target, noise=0.5),
            policy=Chain(gamma=2, temperature=0.9, seed=5),
            verifier=Sampling(),
            prompts=PROMPT_SET,
            max_new_tokens=10,
            temperature=0.9,
            seed=5,
            baseline=False,
        )
        for _ in range(2)
    ]
    counts = [[(r.produced, r.accepted_by_depth) for r in m.records] for m in runs]
    assert counts[0] == counts[1]


def test_methods_without_training_are_measured_on_the_same_prompts(target: Target) -> None:
    lookup = PromptLookup(gamma=3).bind(target)
    recycling = TokenRecycling(nodes=12, depth=3, successors=4).bind(target)
    m = measure(
        target=target,
        drafter=echo(target, noise=0.7),
        policy=Chain(gamma=3),
        verifier=Greedy(),
        prompts=PROMPT_SET,
        max_new_tokens=25,
        baselines={"lookup": lookup, "recycling": recycling},
    )
    assert list(m.beside) == ["lookup", "recycling"]
    for name, shape in (("lookup", "lookup3"), ("recycling", "recycling12")):
        other = m.beside[name]
        assert other.measured.shape == shape
        assert [r.id for r in other.measured.records] == [r.id for r in m.records]
        assert other.measured.lossless is not None
        assert other.measured.lossless.identical == 4
        assert other.measured.mbsu == other.measured.tau.value  # no weights are read
        assert other.measured.plain_ms == m.plain_ms
        assert other.tau_ratio.value == pytest.approx(m.tau.value / other.measured.tau.value)
        assert other.speed_ratio.value == pytest.approx(
            m.tokens_per_s / other.measured.tokens_per_s
        )
    # The warm-up on the first prompt taught nothing: a fresh method gives the same counts.
    decoder = Decoder(
        target=target,
        drafter=TokenRecycling(nodes=12, depth=3, successors=4).bind(target),
        verifier=Greedy(),
        policy=None,
    )
    fresh = [len(decoder.generate(p.tokens, max_new_tokens=25).rounds) for p in PROMPT_SET]
    assert [r.rounds for r in m.beside["recycling"].measured.records] == fresh
    console = Console(record=True, width=160, file=StringIO())
    console.print(table(m, title=caption(m, "set")))
    text = console.export_text()
    assert "recycling12, no training" in text
    assert f"; lookup {m.beside['lookup'].measured.tau_by_category['even'].value:.2f}" in text
    assert json.loads(json.dumps(m.as_dict()))["beside"]["lookup"]["tau_ratio"]["value"] > 0


def test_no_prompts_is_an_error(target: Target) -> None:
    with pytest.raises(ValueError, match="no prompt to measure on"):
        measure(
            target=target,
            drafter=echo(target),
            policy=Chain(gamma=1),
            verifier=Greedy(),
            prompts=[],
            max_new_tokens=9,
        )


def test_weight_bytes_by_hand(target: Target) -> None:
    model = target.model
    embedding = target.embedding_weight_Vd.numel()
    assert target_bytes(target) == 4 * (sum(p.numel() for p in model.parameters()) - embedding)
    d, vocab = target.hidden_size, 50
    medusa = Medusa(
        hidden_size=d, vocab_size=target.vocab_size, num_heads=3, draft_vocab_size=vocab, head=HEAD
    )
    frozen = Medusa(
        hidden_size=d,
        vocab_size=target.vocab_size,
        num_heads=3,
        draft_vocab_size=vocab,
        head={"_target_": "models.head.frozen.FrozenHead"},
    )
    for drafter in (medusa, frozen):
        drafter.bind(target)
        m = measure(
            target=target,
            drafter=drafter,
            policy=Chain(gamma=2),  # reads two heads of three
            verifier=Greedy(),
            prompts=PROMPT_SET[:1],
            max_new_tokens=4,
            baseline=False,
        )
        assert m.draft_bytes == 2 * 4 * (d * d + d + vocab * d)
        c = m.target_bytes
        assert m.mbsu == pytest.approx(m.tau.value * c / (c + m.draft_bytes))


def test_the_prompt_is_not_counted_as_drafting(target: Target) -> None:
    drafter = HydraHeads(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        num_heads=1,
        prefix_layer=True,
        head=HEAD,
    ).bind(target)
    m = measure(
        target=target,
        drafter=drafter,
        policy=Chain(gamma=1),
        verifier=Greedy(),
        prompts=PROMPT_SET[:1],
        max_new_tokens=4,
        baseline=False,
    )
    everything = sum(p.numel() for p in drafter.parameters())
    assert m.draft_bytes == pytest.approx(4 * everything)
    with count_reads(drafter) as counter:
        pass
    assert counter.read == 0
    assert not any(module._forward_pre_hooks for module in drafter.modules())


def test_report_writes_once_and_numbers_the_rest(measured: Measurement, tmp_path: Path) -> None:
    first = write(tmp_path / "x" / "set-chain3-T0", measured, bench="set", facts={"run": "r"})
    second = write(tmp_path / "x" / "set-chain3-T0", measured, bench="set", facts={"run": "r"})
    assert (first.name, second.name) == ("set-chain3-T0", "set-chain3-T0-2")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [first.name, second.name]
    results = json.loads((second / "results.json").read_text())
    assert results["tau"]["value"] == measured.tau.value
    assert len(results["records"]) == 4
    assert (second / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_says_what_the_numbers_mean(measured: Measurement) -> None:
    console = Console(record=True, width=140, file=StringIO())
    console.print(table(measured, title=caption(measured, "set")))
    text = console.export_text()
    assert "bonus token included" in text
    assert f"{measured.tau.value:.2f}" in text
    assert "set: 4 prompts, 100 tokens, greedy, chain3, seed 0, float32 on cpu" in text
