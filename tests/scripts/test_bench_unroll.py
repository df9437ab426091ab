"""The bench of unrolled steps measures a training step, and its memory grows with the steps."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from scripts.bench_unroll import Case, plot, prepare
from scripts.bench_unroll_peer import learned
from scripts.peak import multiplications

SMALL = {"draft_vocab": 64, "hidden": 64, "vocab": 200, "precision": "float32"}


def test_a_step_moves_every_weight() -> None:
    gradients = prepare(Case(steps=3, positions=20, **SMALL))()  # type: ignore[arg-type]
    # C, q, k, v, o, three of the MLP, four norms, the head.
    assert len(gradients) == 13
    assert all(float(g.abs().max()) > 0 for g in gradients)


def test_what_is_kept_for_the_backward_pass_is_linear_in_steps_and_positions() -> None:
    """Bytes kept by autograd, with the memory of weights and inputs counted as well."""

    def kept(steps: int, positions: int) -> float:
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        alive = []
        once = prepare(Case(steps=steps, positions=positions, **SMALL))  # type: ignore[arg-type]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: alive.append(t) or pack(t), lambda t: t
        ):
            once()
        return sum(sizes.values())

    one, four, seven = (kept(steps, 64) for steps in (1, 4, 7))
    assert seven - four == pytest.approx(four - one, rel=0.05)
    short, long, longest = (kept(5, T) for T in (64, 128, 192))
    assert longest - long == pytest.approx(long - short, rel=0.05)


def test_products_are_counted_forward_and_backward() -> None:
    a, w = torch.randn(5, 30), torch.randn(30, 40, requires_grad=True)

    def once() -> list[torch.Tensor]:
        (a @ w).sum().backward()
        assert w.grad is not None
        return [w.grad]

    forward = 2 * 5 * 30 * 40 / 1e9
    assert multiplications(once) == pytest.approx(2 * forward)  # a needs no gradient
    steps = [
        multiplications(prepare(Case(steps=n, positions=64, **SMALL)))  # type: ignore[arg-type]
        for n in (1, 2, 3)
    ]
    assert steps[2] - steps[1] == pytest.approx(steps[1] - steps[0], rel=0.05)


def test_answers_behind_prompts_are_the_same_for_both_and_cost_less() -> None:
    case = Case(steps=3, positions=20, turns=(3, 2), **SMALL)  # type: ignore[arg-type]
    assert case.learn_T == [False, False, False, True, True] * 4
    assert learned(asdict(case)) == case.learn_T
    assert learned(asdict(replace(case, turns=None))) == [True] * 20

    def cost(turns: tuple[int, int] | None) -> float:
        case = Case(steps=7, positions=240, turns=turns, **SMALL)  # type: ignore[arg-type]
        return multiplications(prepare(case))

    assert cost((60, 60)) < 0.7 * cost(None)


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    results = [
        {"steps": s, "positions": T, "seconds": s * T / 1e3, "beyond_mb": s * T}
        for s in (1, 3)
        for T in (64, 128)
    ]
    plot(results, tmp_path / "a" / "unroll.png")
    assert (tmp_path / "a" / "unroll.png").stat().st_size > 10_000
