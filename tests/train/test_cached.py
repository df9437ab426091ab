"""Teachers whose p was kept in a few numbers: gradients, acceptance, refusals, runs."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.shards import Example
from data_prep.signal import Sampled, SignalRows, TopK
from models.target import Target
from tests.train import toy
from tests.train.conftest import Recipe
from train.cached import CachedTeacher, SampledTeacher, TopKTeacher
from train.data import TrainData
from train.losses import (
    TVD,
    CrossEntropy,
    ForwardKL,
    LKLambda,
    ReverseKL,
    RowLoss,
    Rows,
    SmoothL1,
    TargetRows,
    Tempered,
    Term,
    WeightedSum,
)

V, K = 320, 16
DRAFT_IDS = torch.arange(0, 320, 2)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(seed: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, V, generator=noise(seed)) * 2.0


def gradient(target: TargetRows, z_ND: Tensor) -> Tensor:
    """d ForwardKL / d draft logits."""
    z_ND = z_ND.clone().requires_grad_()
    loss_N = ForwardKL()(Rows(z_ND.log_softmax(-1), torch.zeros(len(z_ND)).long(), target))
    return torch.autograd.grad(loss_N.sum(), z_ND)[0]


def top_k(target: Target, draft_ids_D: Tensor | None = None, **settings: Any) -> TopKTeacher:
    teacher = TopKTeacher(target=target, k=K, **settings)
    teacher.set_vocab(draft_ids_D)
    return teacher


def sampled(target: Target, draft_ids_D: Tensor | None = None, draws: int = 50) -> SampledTeacher:
    teacher = SampledTeacher(target=target, draws=draws)
    teacher.set_vocab(draft_ids_D)
    return teacher


# --- top-k ---------------------------------------------------------------------------------------


def test_the_tails_gradient_is_that_of_all_of_p_on_the_kept_ids(target: Target) -> None:
    """On K q - p; on another id q (1 - p_tail / q_tail), which sums to what q - p sums to there."""
    w_NV, z_NV = logits(0), logits(1)
    p_NV, q_NV = w_NV.softmax(-1), z_NV.softmax(-1)
    rows = TopK(k=K).take(w_NV, noise(0))
    got_NV = gradient(top_k(target).stored(rows), z_NV)
    on_NV = torch.zeros(len(p_NV), V).scatter(-1, rows.ids_NK, 1.0).bool()
    torch.testing.assert_close(got_NV[on_NV], (q_NV - p_NV)[on_NV], rtol=1e-4, atol=1e-7)
    p_tail, q_tail = (x.masked_fill(on_NV, 0.0).sum(-1, keepdim=True) for x in (p_NV, q_NV))
    off_NV = q_NV * (1 - p_tail / q_tail)
    torch.testing.assert_close(got_NV[~on_NV], off_NV[~on_NV], rtol=1e-4, atol=1e-7)
    whole_NV = gradient(TargetRows(w_NV.log_softmax(-1)), z_NV)
    torch.testing.assert_close(got_NV[on_NV], whole_NV[on_NV], rtol=1e-4, atol=1e-7)


def test_what_is_wrong_without_the_tail(target: Target) -> None:
    """Renormalised: q - p_K / S. Raw: S q - p_K, which is S times that."""
    w_NV, z_NV = logits(0), logits(1)
    q_NV = z_NV.softmax(-1)
    rows = TopK(k=K).take(w_NV, noise(0))
    mass_N1 = rows.logp_NK.exp().sum(-1, keepdim=True)
    kept_NV = torch.zeros(len(q_NV), V).scatter(-1, rows.ids_NK, rows.logp_NK.exp())
    renormalised_NV = gradient(top_k(target, mode="renormalised").stored(rows), z_NV)
    torch.testing.assert_close(renormalised_NV, q_NV - kept_NV / mass_N1, rtol=1e-4, atol=1e-7)
    raw_NV = gradient(top_k(target, mode="raw").stored(rows), z_NV)
    torch.testing.assert_close(raw_NV, mass_N1 * q_NV - kept_NV, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), TVD(), LKLambda()])
def test_every_loss_is_that_of_the_buckets(target: Target, loss: RowLoss) -> None:
    """The same as for a vocabulary of K + 1 tokens, the last of which is the tail."""
    w_NV, z_NV = logits(0), logits(1)
    rows = TopK(k=K).take(w_NV, noise(0))
    others = torch.ones(len(w_NV), V).scatter(-1, rows.ids_NK, 0.0).bool()

    def buckets(x_NV: Tensor) -> Tensor:
        logx_NV = x_NV.log_softmax(-1)
        tail_N = torch.where(others, logx_NV, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([logx_NV.gather(-1, rows.ids_NK), tail_N], -1)

    label_N = torch.zeros(len(w_NV)).long()
    got_N = loss(Rows(z_NV.log_softmax(-1), label_N, top_k(target).stored(rows)))
    want_N = loss(Rows(buckets(z_NV), label_N, TargetRows(buckets(w_NV))))
    torch.testing.assert_close(got_N, want_N, rtol=1e-4, atol=1e-6)


def test_a_reduced_vocabulary_leaves_mass_out_and_spreads_none(target: Target) -> None:
    """On the kept ids of D: (1 - p(K outside D)) q - p; the tail counts as a whole."""
    w_NV, z_ND = logits(0), logits(1)[:, : len(DRAFT_IDS)]
    p_NV, q_ND = w_NV.softmax(-1), z_ND.softmax(-1)
    rows = TopK(k=K).take(w_NV, noise(0))
    known = top_k(target, DRAFT_IDS).stored(rows)
    outside_NK = rows.ids_NK % 2 == 1
    assert known.ids_NK is not None
    assert torch.equal(known.ids_NK == -1, outside_NK)
    assert torch.equal(known.ids_NK[~outside_NK], rows.ids_NK[~outside_NK] // 2)
    left_out_N1 = rows.logp_NK.exp().masked_fill(~outside_NK, 0.0).sum(-1, keepdim=True)
    torch.testing.assert_close(known.p_ND.sum(-1, keepdim=True), 1 - left_out_N1)
    got_ND = gradient(known, z_ND)
    want_ND = (1 - left_out_N1) * q_ND - p_NV[:, DRAFT_IDS]
    on_ND = torch.zeros(len(p_NV), V).scatter(-1, rows.ids_NK, 1.0).bool()[:, DRAFT_IDS]
    torch.testing.assert_close(got_ND[on_ND], want_ND[on_ND], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["tail", "renormalised", "raw"])
@pytest.mark.parametrize("ids", [None, DRAFT_IDS])
def test_the_bracket_holds_the_acceptance(target: Target, mode: Any, ids: Tensor | None) -> None:
    """For 200 pairs of p and q, near and far, whatever the loss makes of the tail."""
    teacher = top_k(target, ids, mode=mode)
    w_NV = logits(2, 200)
    z_NV = w_NV + torch.linspace(0.1, 3, 200)[:, None] * logits(3, 200)
    z_ND = z_NV if ids is None else z_NV[:, ids]
    p_ND = w_NV.softmax(-1) if ids is None else w_NV.softmax(-1)[:, ids]
    logq_ND = z_ND.log_softmax(-1)
    rows = TopK(k=K).take(w_NV, noise(0))
    low_N, high_N = teacher.acceptance(rows, logq_ND)
    true_N = torch.minimum(p_ND, logq_ND.exp()).sum(-1)
    assert (low_N <= true_N + 1e-6).all()
    assert (true_N <= high_N + 1e-6).all()
    assert (high_N - low_N).mean() > 0.01
    # The lower end is the kept part, by hand for one row.
    named = rows.ids_NK[0] if ids is None else rows.ids_NK[0][rows.ids_NK[0] % 2 == 0] // 2
    assert low_N[0].item() == pytest.approx(
        torch.minimum(p_ND[0], logq_ND[0].exp())[named].sum().item(), rel=1e-4
    )


# --- counts of draws -----------------------------------------------------------------------------


def means_and_errors(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.mean(0), values.std(0) / len(values) ** 0.5


@pytest.mark.parametrize("ids", [None, DRAFT_IDS])
def test_the_gradient_averaged_over_draws_is_that_of_all_of_p(
    target: Target, ids: Tensor | None
) -> None:
    """4,000 times 20 draws from one p. Within five standard errors at each of the ids: P_D q - p.

    The negative control: p renormalised over what was drawn most would not pass."""
    w_V, z_V = logits(4, 1)[0], logits(5, 1)[0]
    z_D = z_V if ids is None else z_V[ids]
    p_D = w_V.softmax(-1) if ids is None else w_V.softmax(-1)[ids]
    rows = Sampled(draws=20).take(w_V.expand(4000, -1), noise(6))
    got_ND = gradient(sampled(target, ids, 20).stored(rows), z_D.expand(4000, -1))
    mean_D, mass = got_ND.mean(0), p_D.sum()
    want_D = mass * z_D.softmax(-1) - p_D
    # Of the counts themselves, and of the mass inside D.
    error_D = ((p_D * (1 - p_D)).sqrt() + (mass * (1 - mass)).clamp(min=0).sqrt()) / 80_000**0.5
    assert ((mean_D - want_D).abs() < 5 * error_D + 1e-7).all()
    assert mean_D.sub(want_D).norm() < 0.05 * want_D.norm()
    wrong_D = p_D.sum() * z_D.softmax(-1) - p_D**2 / (p_D**2).sum()
    assert mean_D.sub(wrong_D).norm() > 0.2 * want_D.norm()


@pytest.mark.parametrize("ids", [None, DRAFT_IDS])
def test_the_acceptance_is_estimated_without_bias(target: Target, ids: Tensor | None) -> None:
    """4,000 times 20 draws: the mean is the exact overlap within four standard errors; the plain
    overlap with counts / N is not."""
    w_V, z_V = logits(4, 1)[0], logits(4, 1)[0] + 0.7 * logits(5, 1)[0]
    z_D = z_V if ids is None else z_V[ids]
    p_D = w_V.softmax(-1) if ids is None else w_V.softmax(-1)[ids]
    exact = torch.minimum(p_D, z_D.softmax(-1)).sum()
    rows = Sampled(draws=20).take(w_V.expand(4000, -1), noise(7))
    teacher = sampled(target, ids, 20)
    logq_ND = z_D.log_softmax(-1).expand(4000, -1)
    low_N, high_N = teacher.acceptance(rows, logq_ND)
    assert torch.equal(low_N, high_N)
    mean, error = means_and_errors(low_N)
    assert (mean - exact).abs() < 4 * error
    assert error < 0.01 * exact
    known = teacher.stored(rows)
    plain_N = torch.minimum(known.p_ND, known.view(logq_ND).exp()).sum(-1)
    assert (plain_N.mean() - exact).abs() > 20 * error


def test_an_argmax_that_was_never_drawn_teaches_nothing(target: Target) -> None:
    rows = SignalRows(
        torch.tensor([[3, 8]]), torch.tensor([[-1.0, -2.0]]), counts_NK=torch.tensor([[0, 50]])
    )
    known = sampled(target).stored(rows)
    assert known.p_ND.tolist() == [[0.0, 1.0, 0.0]]


class Prepared:
    """Stands in for a dataset that has both signals."""

    folder = Path("x")

    def signals(self) -> tuple[str, ...]:
        return (f"topk{K}", "sampled50")


WITH_BOTH: Any = Prepared()

# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss", [TVD(), ReverseKL(), LKLambda(), WeightedSum(terms={"a": Term(weight=1, loss=TVD())})]
)
def test_losses_that_counts_would_bias_are_refused(target: Target, loss: RowLoss) -> None:
    with pytest.raises(ValueError, match="cannot be learned from counts of draws: its gradient"):
        sampled(target).check(loss, WITH_BOTH)
    top_k(target).check(loss, WITH_BOTH)


def test_losses_that_are_right_are_not_refused(target: Target) -> None:
    both = WeightedSum(
        terms={
            "kl": Term(weight=1.0, loss=ForwardKL()),
            "ce": Term(weight=0.1, loss=Tempered(loss=CrossEntropy(), temperature=2.0)),
        }
    )
    for teacher in (sampled(target), top_k(target)):
        teacher.check(both, WITH_BOTH)
        with pytest.raises(ValueError, match="A loss at a temperature needs all of p"):
            teacher.check(Tempered(loss=ForwardKL(), temperature=2.0), WITH_BOTH)
        with pytest.raises(ValueError, match="SmoothL1 compares features"):
            teacher.check(SmoothL1(), WITH_BOTH)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("teacher.k=5",), r"needs the signal 'topk5', but .* has: .*topk8.*\. Capture it"),
        (("dataset.capture=null", "dataset.name=bare"), r"'topk8', but .* has: none\."),
        (("drafter=medusa", "head@drafter.head=own"), "but this drafter reads features"),
        (
            ("teacher=sampled", "teacher.draws=9"),
            r"needs the signal 'sampled9', but .* has: .*topk8",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    recipe: Recipe, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    k = () if "teacher=sampled" in overrides else ("teacher.k=8",)
    with pytest.raises(ValueError, match=message):
        recipe.run(tmp_path / "run", *overrides_of("topk", TOPK8), *k, *overrides)


def test_a_loss_is_refused_before_training(recipe: Recipe, tmp_path: Path) -> None:
    """And before anything is answered."""
    root = tmp_path / "data"
    with pytest.raises(ValueError, match="TVD cannot be learned from counts"):
        recipe.run(
            tmp_path / "run",
            *overrides_of("sampled", SAMPLED),
            "loss=tvd",
            f"dataset.root={root}",
        )
    assert not root.exists()


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [True, False])
def test_rows_of_a_batch_are_those_of_its_teacher_positions(target: Target, cut: bool) -> None:
    """The argmax kept for a row is the target's own where the lesson says the row is, with windows
    that start at the answer and with whole sequences."""
    examples = toy.examples(9)
    reader = SignalReader(target, examples)
    data = TrainData(
        train=reader,
        val=reader,
        seed=0,
        tokens_per_batch=90,
        epochs=1,
        online=False,
        signal="topk8",
        reads_history=not cut,
    )
    seen = 0
    for index in range(len(data.plan)):
        batch = data.train_batch(index)
        assert batch.features is None
        assert batch.context_BS is None
        assert batch.signal is not None
        assert len(batch.signal) == batch.learned
        row = 0
        for b, i in enumerate(data.plan[index].examples):
            window = data.windows[i]
            assert torch.equal(
                batch.tokens_BT[b, : window.stop - window.start],
                examples[i].tokens[window.start : window.stop],
            )
            best_T = target.model(input_ids=examples[i].tokens[None]).logits[0].argmax(-1)
            for t in (batch.learn_BT[b, 1:]).nonzero()[:, 0].tolist():
                assert batch.signal.best_N[row] == best_T[window.start + t]
                row += 1
                seen += 1
        assert row == len(batch.signal)
    assert seen == data.learned_total


class SignalReader(toy.ToyReader):
    """A reader in memory whose signal is made when it is asked for."""

    def __init__(self, target: Target, examples: list[Example]) -> None:
        super().__init__(examples, None)
        self.own = target

    def signal(self, index: int, name: str, /) -> SignalRows:
        example = self.examples[index]
        logits_TV = self.own.model(input_ids=example.tokens[None]).logits[0]
        return TopK(k=8).take(logits_TV[:-1][example.learn[1:]], noise(0))


# --- runs ----------------------------------------------------------------------------------------

TOPK8 = "{_target_: data_prep.signal.TopK, k: 8}"
SAMPLED = "{_target_: data_prep.signal.Sampled, draws: 50}"


def overrides_of(teacher: str, signal: str) -> list[str]:
    capture = "_target_: data_prep.stage.capture.Capture, features: false"
    return [
        "drafter=causal_lm",
        "head@drafter.head=own",
        f"teacher={teacher}",
        f"+dataset.capture={{{capture}, signal: {signal}}}",
        "final_decode=null",
    ]


FULL = "drafter.draft_vocab_size=null"
"""With the whole vocabulary a divergence is never negative."""


def validated(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "run.json").read_text())["results"]["val"]


def losses(run_dir: Path) -> list[float]:
    with (run_dir / "metrics.csv").open() as file:
        return [float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]]


def test_the_metrics_are_those_of_the_target(recipe: Recipe, tmp_path: Path) -> None:
    """One drafter that learns nothing, judged by each teacher: same agreement and ranks, the
    bracket around the overlap, the estimate near it, the tail's KL below the whole one."""
    still = ["optimizer.lr=0.0", "trainer.max_steps=1", FULL]
    common = [*overrides_of("topk", TOPK8), *still]
    online = validated(recipe.run(tmp_path / "online", *common, "teacher=online"))
    top = validated(recipe.run(tmp_path / "topk", *common, "teacher.k=8"))
    drawn = validated(recipe.run(tmp_path / "sampled", *overrides_of("sampled", SAMPLED), *still))
    for name in ("agreement_0", "top10_0", "tau"):
        assert top[name] == drawn[name] == pytest.approx(online[name], rel=1e-9)
    assert "overlap_0" not in top
    assert top["overlap_at_least_0"] < online["overlap_0"] < top["overlap_at_most_0"]
    assert drawn["overlap_0"] == pytest.approx(online["overlap_0"], rel=0.05)
    assert 0.3 * online["loss"] < top["loss"] < online["loss"]


@pytest.mark.parametrize(
    ("teacher", "signal"), [("topk", TOPK8), ("sampled", SAMPLED)], ids=["topk", "sampled"]
)
def test_a_drafter_learns_without_the_target(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, signal: str
) -> None:
    """No feature is computed in the whole run, and the loss falls."""
    monkeypatch.setattr(CachedTeacher, "features", None)
    k = ["teacher.k=8"] if teacher == "topk" else []
    settings = ["trainer.max_steps=30", "optimizer.lr=3e-3", "trainer.val_every_steps=10"]
    run_dir = recipe.run(tmp_path / "run", *overrides_of(teacher, signal), *k, *settings)
    made = losses(run_dir)
    assert sum(made[-5:]) < 0.9 * sum(made[:5])


def test_on_policy_batches_run_the_target(recipe: Recipe, tmp_path: Path) -> None:
    """Half of the batches are the drafter's own text, of which nothing was kept."""
    run_dir = recipe.run(
        tmp_path / "run",
        *overrides_of("topk", TOPK8),
        "teacher.k=8",
        "onpolicy=distillspec",
        "onpolicy.fraction=0.5",
        "onpolicy.max_new_tokens=6",
        "trainer.max_steps=6",
        FULL,
    )
    with (run_dir / "metrics.csv").open() as file:
        tokens = [float(r["train/sampled_tokens"] or 0) for r in csv.DictReader(file)]
    assert any(tokens)
    assert not all(tokens)
    assert all(loss > 0 for loss in losses(run_dir))
