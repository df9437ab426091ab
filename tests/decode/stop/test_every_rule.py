"""Every rule of conf/stop: drafts end where it says, and the output keeps the target's law.

A new file in conf/stop is covered on arrival; SETTINGS makes it end drafts on these toys.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from conf.check import build
from decode.session import Decoder
from decode.stop import spec_kv
from decode.stop.base import SeenLive, Stop
from decode.tree import chain
from decode.tree.chain import Chain
from decode.verifier.block import Block
from decode.verifier.sampling import Sampling
from models.acceptance import AcceptanceHead
from tests.decode.enumerated import TableDrafter, texts_of
from tests.decode.toy import Scripted, chi_square, echo, law_error, tables, text_law
from tests.tiny import tiny_target

ROOT = Path(__file__).parents[3]
RULES = sorted(path.stem for path in (ROOT / "conf" / "stop").glob("*.yaml"))
SETTINGS: dict[str, dict[str, Any]] = {
    "confidence": {"threshold": 0.9},
    "svip": {"threshold": 0.7},
    "specdec_pp": {"threshold": 0.6},
    "heuristic": {"start": 2},
    "dynamic_threshold": {"threshold": 0.4},
    "del_exit": {"probe": 2, "costs": [1.2, 1.5]},
}
NEVER_EARLY = {"exit"}
V, GAMMA, LENGTH = 2, 3, 3


class TableJudge(AcceptanceHead):
    """Any function of the row and the drafted token, which is the hardest case."""

    def __init__(self) -> None:
        super().__init__(state_size=V, embedding_size=V, reads="drawn", num_blocks=0)

    def judged(self, states_Nd: Tensor, **given: Any) -> Tensor:
        row_D, token = given["logq_ND"][0].exp(), int(given["drafted_N"][0])
        return (0.35 + 0.4 * token * row_D[0] + 0.3 * row_D[token]).clamp(max=0.99).logit()[None]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with a random length network."""
    torch.manual_seed(3)
    net = spec_kv.LengthNet(GAMMA)
    with torch.no_grad():
        net.net[2].weight.mul_(8.0)  # type: ignore[union-attr, operator]
    spec_kv.save(tmp_path / spec_kv.FILE, net, [1.0, 1.5, 1.9])
    return tmp_path


def rule(name: str, run_dir: Path, judge: AcceptanceHead) -> Stop:
    node: Any = OmegaConf.load(ROOT / "conf" / "stop" / f"{name}.yaml")
    node = OmegaConf.merge(node, SETTINGS.get(name, {}))
    return build(node, acceptance=judge, exit_costs=TableDrafter.exit_costs, run_dir=run_dir)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws in double precision, so that they agree to 1e-12."""
    monkeypatch.setattr(chain, "probabilities", lambda logits, **_: logits.softmax(-1))


def rounds(
    p: dict[tuple, Tensor], q: dict[tuple, Tensor], stop: Stop, chance: Scripted, verifier: Any
) -> tuple[tuple, list[int]]:
    """Rounds of one decoder until LENGTH tokens are known: a rule may learn in between. Returns
    the text and by how much every draft was shorter than it could have been."""
    text: tuple = ()
    policy, short = Chain(gamma=GAMMA, temperature=1.0, stop=stop), []
    policy._chance = chance  # type: ignore[assignment]
    while len(text) < LENGTH:
        policy.gamma = min(GAMMA, LENGTH - len(text))
        behind = {t[len(text) :]: row for t, row in q.items() if t[: len(text)] == text}
        tree = TableDrafter(behind).propose(None, torch.tensor([0]), policy)
        texts = [(*text, *drafted) for drafted in texts_of(tree)]
        verdict = verifier.verify(tree, dict(enumerate(p[t] for t in texts)).__getitem__, chance)
        accepted = len(verdict.path) - 1
        policy.verified(accepted + int(accepted < len(tree) - 1), accepted)
        text = (*texts[verdict.path[-1]], verdict.token)
        short.append(policy.gamma - (len(tree) - 1))
    return text, short


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("verifier", [Sampling(), Block()], ids=["sampling", "block"])
def test_the_law_of_several_rounds_is_the_targets(name: str, verifier: Any, run_dir: Path) -> None:
    p, q = tables(1, V, LENGTH), tables(2, V, LENGTH, sharpness=2.0)
    short: Counter[int] = Counter()

    def round_(chance: Scripted) -> tuple:
        text, made = rounds(p, q, rule(name, run_dir, TableJudge()), chance, verifier)
        short.update(made)
        return text

    assert law_error(p, V, LENGTH, round_) < 1e-12
    assert set(short) - {0} or name in NEVER_EARLY, "no draft ended early"


@pytest.mark.usefixtures("double")
def test_control_the_same_rounds_with_a_rule_that_unsubmits_are_biased(run_dir: Path) -> None:
    """The token a rule stopped behind is taken back: what `Stop` cannot express."""
    p, q = tables(1, V, GAMMA + 1), tables(2, V, GAMMA, sharpness=2.0)

    def round_(chance: Scripted) -> tuple:
        policy = Chain(gamma=GAMMA, temperature=1.0, stop=rule("specdec_pp", run_dir, TableJudge()))
        policy._chance = chance  # type: ignore[assignment]
        tree = TableDrafter(q).propose(None, torch.tensor([0]), policy)
        tree = tree.keep(torch.arange(max(1, len(tree) - 1)))
        texts = texts_of(tree)
        verdict = Sampling().verify(tree, lambda node: p[texts[node]], chance)
        return (*texts[verdict.path[-1]], verdict.token)

    assert law_error(p, V, GAMMA + 1, round_) > 1e-2


@pytest.mark.parametrize("name", ["specdec_pp"])
def test_sampled_text_of_a_real_decoder_has_the_targets_law(name: str, run_dir: Path) -> None:
    """Chi-square over all texts, a small vocabulary, one rule and a real head for all samples."""
    target = tiny_target(vocab_size=5)
    prompt, draws = [3, 4, 1], 300
    law = text_law(target, prompt, 2, temperature=1.3)
    drafter = echo(target, noise=1.5)
    torch.manual_seed(1)
    judge = AcceptanceHead(state_size=32, embedding_size=32, reads="drawn", rejection_weight=1.0)
    policy = Chain(gamma=2, temperature=1.3, stop=rule(name, run_dir, judge))
    decoder = Decoder(
        target=target,
        drafter=drafter,
        verifier=Sampling(),
        policy=policy,
        temperature=1.3,
        seed=5,
    )
    found: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        made = decoder.generate(prompt, max_new_tokens=2, stop_at_eos=False)
        found[tuple(made.tokens)] += 1
    statistic, bound = chi_square(
        [found[text] for text in law], [draws * share for share in law.values()]
    )
    assert statistic < bound


@pytest.mark.parametrize("name", RULES)
def test_greedy_text_does_not_depend_on_the_rule(name: str, run_dir: Path) -> None:
    target = tiny_target()
    plain = Decoder(target=target, drafter=None, verifier=Sampling(), policy=None)
    prompt = [5, 9, 17, 30]
    truth = plain.generate(prompt, max_new_tokens=20, stop_at_eos=False)
    torch.manual_seed(1)
    judge = AcceptanceHead(state_size=32, embedding_size=32, reads="drawn", rejection_weight=1.0)
    policy = Chain(gamma=5, stop=rule(name, run_dir, judge))
    decoder = Decoder(
        target=target, drafter=echo(target, noise=0.7), verifier=Sampling(), policy=policy
    )
    made = decoder.generate(prompt, max_new_tokens=20, stop_at_eos=False)
    assert made.tokens == truth.tokens
    assert min(r.depth for r in made.rounds) >= 1


def test_every_rule_has_a_test_of_its_own_maths() -> None:
    tested = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*")}
    assert set(RULES) <= tested


def test_what_a_rule_sees_is_the_row_at_temperature_1() -> None:
    logits_ND = torch.tensor([[0.0, 1.0, 2.0]])
    q_D = logits_ND[0].softmax(-1)
    seen = SeenLive(
        0,
        logits_ND=logits_ND,
        drafted_N=torch.tensor([1]),
        states_Nd=torch.zeros(1, 3),
        drafter=TableDrafter({}),  # type: ignore[arg-type]
        judge=None,
    )
    assert seen.best == pytest.approx(float(q_D[2]))
    assert seen.drawn == pytest.approx(float(q_D[1]))
    assert seen.entropy == pytest.approx(float(-(q_D * q_D.log()).sum()))
