"""Every loss against its gradient on paper, finite differences and its invariances.

Shape legend: N rows, C columns.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import conf
import train.losses
from conf.check import build, check
from train.losses import (
    JSD,
    TVD,
    AdaptiveKL,
    CrossEntropy,
    ForwardKL,
    LKAlpha,
    LKLambda,
    ReverseKL,
    RowLoss,
    Rows,
    SkewedKL,
    TargetLogits,
    TargetRows,
    Tempered,
    Term,
    TopK,
    TVDPlusPlus,
    WeightedSum,
)

N, C = 6, 11
LOSS_FILES = Path(conf.__file__).parent / "loss"
Gradient = Callable[[Tensor, Tensor], Tensor]


def given(loss: RowLoss, logits: Tensor, p: Tensor | None, **more: Any) -> Rows:
    """Rows with the statistics and draws that the loss asks for."""
    target = None if p is None else TargetRows(p.log().clamp(min=-1e4))
    label = torch.arange(len(logits)) % logits.shape[-1]
    uniform = None
    if loss.num_draws:
        g = torch.Generator().manual_seed(4)
        uniform = torch.rand(len(logits), loss.num_draws, generator=g, dtype=torch.float64)
    rows = {"label_N": label, "target": target, "uniform_NS": uniform} | more
    if loss.num_statistics:
        with torch.no_grad():
            sums = loss.statistics(Rows(logits.log_softmax(-1), **rows))
        rows["statistics_S"] = sums
    return Rows(logits.log_softmax(-1), **rows)


def draw(*, inside: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Draft logits, and p with a share `inside` of its mass in the draft vocabulary."""
    torch.manual_seed(11)
    logits = (1.5 * torch.randn(N, C, dtype=dtype)).requires_grad_()
    return logits, inside * (2 * torch.randn(N, C, dtype=dtype)).softmax(-1)


def gradient(loss: RowLoss, logits: Tensor, p: Tensor, **more: Any) -> Tensor:
    logits.grad = None
    loss(given(loss, logits, p, **more)).sum().backward()
    assert logits.grad is not None
    return logits.grad.clone()


def centred(q: Tensor, g: Tensor) -> Tensor:
    """q (g - E_q g): the gradient in the logits of a loss whose gradient in q is g."""
    return q * (g - (q * g).sum(-1, keepdim=True))


def jsd(beta: float) -> Gradient:
    return lambda p, q: (1 - beta) * centred(q, (q / (beta * p + (1 - beta) * q)).log())


def skewed_forward(skew: float) -> Gradient:
    return lambda p, q: -(1 - skew) * centred(q, p / (skew * p + (1 - skew) * q))


def skewed_reverse(skew: float) -> Gradient:
    def of(p: Tensor, q: Tensor) -> Tensor:
        m = (1 - skew) * p + skew * q
        return centred(q, (q / m).log() - skew * q / m)

    return of


def tvd(p: Tensor, q: Tensor) -> Tensor:
    return 0.5 * centred(q, (q - p).sign())


def alpha(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(p, q).sum(-1, keepdim=True)


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return p.sum(-1, keepdim=True) * q - p


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    return centred(q, (q / p).log())


def lk_lambda(eta: float) -> Gradient:
    def of(p: Tensor, q: Tensor) -> Tensor:
        share = (-eta * alpha(p, q)).exp()
        return share * forward_kl(p, q) + (1 - share) * tvd(p, q)

    return of


def lk_lambda_batch(p: Tensor, q: Tensor) -> Tensor:
    share = (-3.0 * alpha(p, q).mean()).exp()
    return share * forward_kl(p, q) + (1 - share) * tvd(p, q)


def tvd_plus_plus(p: Tensor, q: Tensor) -> Tensor:
    mu = (q * (p > q)).sum(-1).mean()
    return tvd(p, q) / (mu * (1 - mu)).sqrt()


def top_k(k: int) -> Gradient:
    def of(p: Tensor, q: Tensor) -> Tensor:
        kept = p * (p >= p.topk(k).values[:, -1:])
        return kept.sum(-1, keepdim=True) * q - kept

    return of


def adaptive(p: Tensor, q: Tensor) -> Tensor:
    """The head by hand: tokens in order of p, until half of the mass inside is reached."""
    made = []
    for p_C, q_C in zip(p, q, strict=True):
        head = torch.zeros_like(p_C, dtype=torch.bool)
        for v in p_C.argsort(descending=True).tolist():
            if p_C[head].sum() >= 0.5 * p_C.sum():
                break
            head[v] = True
        gap = (p_C - q_C).abs()
        share = gap[head].sum() / gap.sum()
        forward, reverse = forward_kl(p_C[None], q_C[None]), reverse_kl(p_C[None], q_C[None])
        made.append(share * forward + (1 - share) * reverse)
    return torch.cat(made)


LK_BY_POSITION = LKLambda(eta=3.0)
PAPER: list[tuple[RowLoss, Gradient]] = [
    (ForwardKL(), forward_kl),
    (ReverseKL(), reverse_kl),
    (JSD(beta=0.5), jsd(0.5)),
    (JSD(beta=0.3), jsd(0.3)),
    (TVD(), tvd),
    (TVDPlusPlus(mode="exact"), tvd_plus_plus),
    (LKAlpha(), lambda p, q: tvd(p, q) / alpha(p, q)),
    (LK_BY_POSITION, lk_lambda(3.0)),
    (LKLambda(eta=3.0, alpha="batch"), lk_lambda_batch),
    (SkewedKL(direction="forward", skew=0.1), skewed_forward(0.1)),
    (SkewedKL(direction="reverse", skew=0.1), skewed_reverse(0.1)),
    (AdaptiveKL(), adaptive),
    (TopK(k=4), top_k(4)),
]
IDS = [f"{type(loss).__name__}-{i}" for i, (loss, _) in enumerate(PAPER)]
LOSSES = [loss for loss, _ in PAPER]
DIVERGENCES = [loss for loss in LOSSES if not isinstance(loss, TopK)]
"""Those that are 0 where q = p."""


@pytest.mark.parametrize("inside", [1.0, 0.6], ids=["whole", "reduced"])
@pytest.mark.parametrize(("loss", "expected"), PAPER, ids=IDS)
def test_gradient_on_paper(loss: RowLoss, expected: Gradient, inside: float) -> None:
    """Reduced, p keeps its mass of 0.6: the same formulas, nothing renormalised."""
    logits, p = draw(inside=inside)
    q = logits.detach().softmax(-1)
    torch.testing.assert_close(gradient(loss, logits, p), expected(p, q))


@pytest.mark.parametrize(
    "loss", [x for x in LOSSES if not isinstance(x, AdaptiveKL) and x is not LK_BY_POSITION]
)
def test_gradient_by_finite_differences(loss: RowLoss) -> None:
    """Statistics are held at the point. (Left out: losses with weights that depend on q and have
    no gradient, on purpose.)"""
    logits, p = draw(inside=0.8)
    held = given(loss, logits.detach(), p).statistics_S

    def value(z: Tensor) -> Tensor:
        rows = {"target": TargetRows(p.log()), "statistics_S": held}
        return loss(Rows(z.log_softmax(-1), torch.zeros(N).long(), **rows))

    assert torch.autograd.gradcheck(value, (logits,), eps=1e-7)


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_a_constant_added_to_the_logits_changes_nothing(loss: RowLoss) -> None:
    logits, p = draw(dtype=torch.float32)
    shifted = loss(given(loss, logits + 7.0, p))
    torch.testing.assert_close(shifted, loss(given(loss, logits, p)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_nothing_to_learn_where_q_is_p(loss: RowLoss) -> None:
    logits, _ = draw()
    q = logits.detach().softmax(-1)
    rows = given(loss, logits, None, target=TargetRows(logits.detach().log_softmax(-1)))
    loss(rows).sum().backward()
    assert loss(rows).abs().max() < 1e-12
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12, q


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_finite_where_the_target_forbids_tokens(loss: RowLoss, dtype: torch.dtype) -> None:
    """Forbidden ids come as -inf logits of the target; the loss and its gradient stay finite."""
    logits, p = draw(dtype=dtype)
    target_logits = p.log().float()
    target_logits[:, ::2] = -torch.inf
    target = TargetLogits(target_logits).take(slice(None))
    assert target.p_ND[:, ::2].abs().max() == 0
    value = loss(given(loss, logits, None, target=target))
    value.sum().backward()
    assert logits.grad is not None
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=IDS)
def test_rows_do_not_see_each_other_s_order(loss: RowLoss) -> None:
    """Another order of rows gives the same losses in that order; so do rows twice."""
    logits, p = draw()
    value = loss(given(loss, logits, p))
    order = torch.randperm(N)
    torch.testing.assert_close(loss(given(loss, logits[order], p[order])), value[order])
    twice = loss(given(loss, logits.repeat(2, 1), p.repeat(2, 1)))
    torch.testing.assert_close(twice.mean(), value.mean())


@pytest.mark.parametrize(
    ("loss", "full"),
    [
        (ReverseKL(floor=1e-30), lambda p, q: (q * (q / p).log()).nansum(-1)),
        (TVD(), lambda p, q: 0.5 * (p - q).abs().sum(-1)),
        (LKAlpha(), lambda p, q: -torch.minimum(p, q).sum(-1).log()),
        (
            JSD(beta=0.3),
            lambda p, q: (
                0.3 * (p * (p / (0.3 * p + 0.7 * q)).log()).sum(-1)
                + 0.7 * (q * (q / (0.3 * p + 0.7 * q)).log()).nansum(-1)
            ),
        ),
        (SkewedKL(skew=0.1), lambda p, q: (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1)),
        (
            SkewedKL(direction="reverse", skew=0.1),
            lambda p, q: (q * (q / (0.9 * p + 0.1 * q)).log()).nansum(-1),
        ),
    ],
)
def test_the_value_is_that_of_the_full_distributions(loss: RowLoss, full: Gradient) -> None:
    """p over 15 tokens, drafts over the first 11: q is 0 on the other four."""
    logits, _ = draw()
    p = torch.randn(N, C + 4, dtype=torch.float64).softmax(-1)
    q = torch.cat([logits.detach().softmax(-1), torch.zeros(N, 4, dtype=torch.float64)], -1)
    torch.testing.assert_close(loss(given(loss, logits, p[:, :C])).detach(), full(p, q))


def test_jsd_tends_to_the_kl_divergences_at_its_ends() -> None:
    logits, p = draw()
    rows = given(JSD(), logits, p)
    for beta, end in ((1e-7, ForwardKL()), (1 - 1e-7, ReverseKL())):
        scaled = JSD(beta=beta)(rows) / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, end(rows), rtol=1e-3, atol=1e-4)
    assert JSD(beta=0.5)(rows).max().item() < math.log(2)


def test_lk_lambda_goes_from_kl_to_overlap() -> None:
    """alpha -> 0: all KL. alpha = 1: e^-3 = 0.0498 of it."""
    logits = torch.tensor([[40.0, 0.0, 0.0]], dtype=torch.float64)
    p = torch.tensor([[1e-12, 0.5, 0.5]], dtype=torch.float64)
    rows = given(ForwardKL(), logits, p)
    torch.testing.assert_close(LKLambda()(rows), ForwardKL()(rows))
    same = given(ForwardKL(), p.log(), p)
    shares = math.exp(-3.0)
    expected = shares * ForwardKL()(same) + (1 - shares) * TVD()(same)
    torch.testing.assert_close(LKLambda()(same), expected)


def test_lk_alpha_of_a_one_hot_target_is_the_cross_entropy() -> None:
    logits, _ = draw()
    p = torch.eye(C, dtype=torch.float64)[torch.arange(N) % C]
    rows = given(LKAlpha(), logits, p)
    torch.testing.assert_close(LKAlpha()(rows), CrossEntropy()(rows))


# --- TVD++ ----------------------------------------------------------------------------------------


def test_exact_tvd_plus_plus_is_tvd_over_sigma() -> None:
    logits, p = draw()
    plain, scaled = gradient(TVD(), logits, p), gradient(TVDPlusPlus(), logits, p)
    cosine = torch.cosine_similarity(plain.flatten(), scaled.flatten(), dim=0)
    assert cosine.item() == pytest.approx(1.0)
    q = logits.detach().softmax(-1)
    raised = (p > q).double()
    mu = (q * raised).sum(-1).mean()
    torch.testing.assert_close(scaled, plain / (mu * (1 - mu)).sqrt())
    assert (scaled * raised).sum() < 0, "tokens with p > q must become likelier"


def test_sampled_tvd_plus_plus_estimates_the_exact_one() -> None:
    """Over 4000 batches of 6 rows x 8 tokens, with mu and sigma held at their true values."""
    logits, p = draw()
    sampled = TVDPlusPlus(mode="sampled", samples=8)
    exact = TVDPlusPlus(mode="exact")
    true = given(exact, logits.detach(), p).statistics_S
    expected = gradient(exact, logits, p)
    g = torch.Generator().manual_seed(0)
    copies = 4000
    many = logits.detach().repeat(copies, 1).requires_grad_()
    uniform = torch.rand(copies * N, 8, generator=g, dtype=torch.float64)
    target = TargetRows(p.log().repeat(copies, 1))
    rows = Rows(
        many.log_softmax(-1),
        torch.zeros(copies * N).long(),
        target=target,
        uniform_NS=uniform,
        statistics_S=true,
    )
    sampled(rows).sum().backward()
    assert many.grad is not None
    each = many.grad.view(copies, N, C)
    error = each.std(0) / copies**0.5
    distance = ((each.mean(0) - expected) / error.clamp(min=1e-12)).abs()
    assert distance.max() < 4.0  # the largest of 66
    assert (distance > 3.0).sum() <= 1


def test_sampled_statistics_are_of_the_same_draws() -> None:
    """Three tokens at u = 0.05, 0.35, 0.95 of q = (0.1, 0.4, 0.5): tokens 0, 1, 2."""
    q, p = torch.tensor([[0.1, 0.4, 0.5]]), torch.tensor([[0.3, 0.3, 0.4]])
    loss = TVDPlusPlus(mode="sampled", samples=3)
    rows = given(loss, q.log(), p, uniform_NS=torch.tensor([[0.05, 0.35, 0.95]]))
    assert rows.statistics_S is not None
    assert rows.statistics_S.tolist() == [3.0, 1.0]  # only token 0 has p > q
    sigma = math.sqrt(1 / 3 * 2 / 3)
    advantage = [(1 - 1 / 3) / sigma, (-1 / 3) / sigma, (-1 / 3) / sigma]
    expected = -sum(a * math.log(x) for a, x in zip(advantage, (0.1, 0.4, 0.5), strict=True)) / 3
    assert loss(rows).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["exact", "sampled"])
def test_tvd_plus_plus_without_rewards_teaches_nothing(mode: Any) -> None:
    """q = p: no token has p > q."""
    logits, _ = draw()
    loss = TVDPlusPlus(mode=mode)
    rows = given(loss, logits, None, target=TargetRows(logits.detach().log_softmax(-1)))
    loss(rows).sum().backward()
    assert loss(rows).tolist() == [0.0] * N
    assert logits.grad is not None
    assert logits.grad.abs().max() == 0


def test_sampled_tvd_plus_plus_without_variance_teaches_nothing() -> None:
    """q = (0.6, 0.4), p = (0.7, 0.3): u below 0.6 draws token 0 only, which is always rewarded."""
    loss = TVDPlusPlus(mode="sampled", samples=3)
    logits = torch.tensor([[0.6, 0.4]]).log().requires_grad_()
    uniform = torch.tensor([[0.1, 0.3, 0.55]])
    rows = given(loss, logits, torch.tensor([[0.7, 0.3]]), uniform_NS=uniform)
    loss(rows).sum().backward()
    assert loss(rows).tolist() == [0.0]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0]]


# --- temperature, sums, mistakes ------------------------------------------------------------------


@pytest.mark.parametrize(("square", "factor"), [(True, 2.5), (False, 1 / 2.5)])
def test_gradient_at_a_temperature(square: bool, factor: float) -> None:
    """(q_T - p_T) / T, times T^2 with `square`."""
    logits, p = draw()
    loss = Tempered(loss=ForwardKL(), temperature=2.5, square=square)
    p_T = (p.log() / 2.5).softmax(-1)
    expected = factor * ((logits.detach() / 2.5).softmax(-1) - p_T)
    torch.testing.assert_close(gradient(loss, logits, p), expected)


def test_temperature_one_changes_nothing_and_keeps_the_mass() -> None:
    logits, p = draw(inside=0.7)
    loss = Tempered(loss=ForwardKL(), temperature=1.0)
    torch.testing.assert_close(gradient(loss, logits, p), gradient(ForwardKL(), logits, p))
    warm = Tempered(loss=ForwardKL(), temperature=3.0)._tempered(given(loss, logits, p))
    torch.testing.assert_close(warm.p_NC.sum(-1), torch.full((N,), 0.7, dtype=torch.float64))


def test_buckets_have_no_temperature() -> None:
    logp = torch.tensor([[0.6, 0.4]]).log()
    rows = Rows(
        torch.zeros(1, 5).log_softmax(-1), torch.tensor([0]), TargetRows(logp, torch.tensor([[2]]))
    )
    with pytest.raises(ValueError, match="stores a few tokens and a tail"):
        Tempered(loss=ForwardKL(), temperature=2.0)(rows)


def test_a_sum_gives_each_term_its_own_draws_and_statistics() -> None:
    logits, p = draw()
    one, two = TVDPlusPlus(mode="sampled", samples=2), TVDPlusPlus(mode="sampled", samples=3)
    lk = LKLambda(alpha="batch")
    together = WeightedSum(
        terms={
            "one": Term(weight=2.0, loss=one),
            "lk": Term(weight=1.0, loss=lk),
            "two": Term(weight=3.0, loss=two),
        }
    )
    assert (together.num_draws, together.num_statistics) == (5, 6)
    rows = given(together, logits, p)
    assert rows.uniform_NS is not None
    expected = (
        2.0 * one(given(one, logits, p, uniform_NS=rows.uniform_NS[:, :2]))
        + lk(given(lk, logits, p))
        + 3.0 * two(given(two, logits, p, uniform_NS=rows.uniform_NS[:, 2:]))
    )
    torch.testing.assert_close(together(rows), expected)


def test_hass_loss_by_hand() -> None:
    """p = (5, 3, 2)/10, q = (1, 1, 2)/4, the two likeliest: 0.5 log 4 + 0.3 log 4."""
    rows = given(TopK(k=2), torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.tensor([[0.5, 0.3, 0.2]]))
    assert TopK(k=2)(rows).item() == pytest.approx(0.8 * math.log(4.0))


def test_counts_of_draws_teach_what_p_teaches() -> None:
    """RS-KD: the gradient of the forward KL on counts / 50, averaged over draws, is q - p."""
    torch.manual_seed(2)
    logits, p = draw()
    copies = 3000
    counts = torch.stack(
        [torch.multinomial(p, 50, replacement=True) for _ in range(copies)]
    )  # [copies, N, 50]
    shares = torch.zeros(copies, N, C, dtype=torch.float64)
    shares.scatter_add_(-1, counts, torch.full_like(counts, 1 / 50, dtype=torch.float64))
    many = logits.detach().repeat(copies, 1).requires_grad_()
    target = TargetRows(shares.view(-1, C).log().clamp(min=-1e4))
    ForwardKL()(Rows(many.log_softmax(-1), torch.zeros(copies * N).long(), target)).sum().backward()
    assert many.grad is not None
    each = many.grad.view(copies, N, C)
    expected = logits.detach().softmax(-1) - p
    error = each.std(0) / copies**0.5
    assert ((each.mean(0) - expected).abs() < 4 * error + 1e-12).all()


@pytest.mark.parametrize("file", sorted(LOSS_FILES.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_file_of_conf_loss_is_a_loss(file: Path) -> None:
    """Keys and types are those of the signature, and every argument is there with its default."""
    node = OmegaConf.load(file)
    assert isinstance(node, DictConfig)
    check(OmegaConf.create({"x": node}))
    assert isinstance(build(node), RowLoss)
    function = getattr(train.losses, str(node._target_).removeprefix("train.losses."))
    defaults = {
        name: p.default
        for name, p in inspect.signature(function).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    assert {name: node.get(name) for name in defaults} == defaults


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: JSD(beta=0.0), "strictly between 0 and 1"),
        (lambda: JSD(beta=1.0), "strictly between 0 and 1"),
        (lambda: SkewedKL(skew=1.0), "strictly between 0 and 1"),
        (lambda: ReverseKL(floor=0.0), "must lie between 0 and 1"),
        (lambda: AdaptiveKL(head_mass=1.0), "must lie between 0 and 1"),
        (lambda: TopK(k=0), "at least 1"),
        (lambda: TVDPlusPlus(samples=0), "at least 1"),
        (lambda: LKLambda(eta=-1.0), "must not be negative"),
        (lambda: Tempered(loss=ForwardKL(), temperature=0.0), "must be positive"),
    ],
)
def test_mistakes_are_sentences(make: Callable[[], RowLoss], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()
