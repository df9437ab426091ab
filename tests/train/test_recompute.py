"""trainer.recompute: the same gradients from fewer bytes kept for the backward pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.drafter.base import Drafter
from models.target import Target
from tests.train.conftest import Recipe, assert_same
from train.recompute import recompute_activations
from train.run import make_drafter


def make(recipe: Recipe, target: Target, family: str) -> Drafter:
    torch.manual_seed(0)
    made = make_drafter(recipe.compose(f"+experiment={family}").drafter, target)
    made.bind(target).init_from(target)
    return made.train()


def learn(drafter: Drafter, target: Target) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the bytes that autograd kept for them (weights left out)."""
    torch.manual_seed(1)
    tokens_BT = torch.randint(0, target.vocab_size, (4, 64))
    features = target.forward(tokens_BT, layers=drafter.feature_layers)
    weights = {p.untyped_storage().data_ptr() for p in drafter.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    drafter.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        depths = list(drafter.unroll(features, tokens_BT))
        total = sum((depth.states_BNd.float() ** 2).sum() for depth in depths)
    assert isinstance(total, Tensor)
    total.backward()
    gradients = {n: p.grad for n, p in drafter.named_parameters() if p.grad is not None}
    return gradients, sum(kept.values())


@pytest.mark.parametrize(
    ("family", "modules", "share"), [("eagle3", 1, 0.7), ("sorted_lm", 4, 0.2)]
)
def test_same_gradients_from_fewer_bytes(
    recipe: Recipe, target: Target, family: str, modules: int, share: float
) -> None:
    """A language model's layers keep their inputs alone; a layer that also writes keys and values
    all but its MLP."""
    plain, plain_bytes = learn(make(recipe, target, family), target)
    drafter = make(recipe, target, family)
    assert recompute_activations(drafter) == modules
    again, again_bytes = learn(drafter, target)
    assert again.keys() == plain.keys()
    for name, gradient in again.items():
        assert torch.equal(gradient, plain[name]), name
    assert again_bytes < share * plain_bytes


def test_a_run_is_the_same(recipe: Recipe, tmp_path: Path) -> None:
    given = ["+experiment=small_lm", "trainer.max_steps=4", "final_decode=null"]
    made = [
        recipe.run(tmp_path / name, *given, *more, without="final_decode")
        for name, more in (("plain", []), ("again", ["trainer.recompute=true"]))
    ]
    assert_same(made[1], made[0])


def test_what_has_no_layers_is_refused(recipe: Recipe, target: Target) -> None:
    with pytest.raises(ValueError, match="Medusa has none; leave it out"):
        recompute_activations(make(recipe, target, "medusa"))
