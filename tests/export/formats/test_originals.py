"""The published code's own files, TGI's and TensorRT-LLM's: equal drafts, names, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from export.base import Exporter
from export.check import check_export
from export.formats.base import read_config
from export.original import OriginalExporter
from export.tensorrt_llm import TensorrtLlmExporter
from export.tensors import load_tensors
from export.tgi import TgiExporter
from models.target import Target
from tests.export.formats.drafters import (
    FROZEN,
    LOW_RANK,
    OWN,
    TIED,
    eagle,
    eagle3,
    hydra,
    kangaroo,
    medusa,
    mlp_speculator,
    proven,
)

CHAINS = 6 + 16


@pytest.mark.parametrize(
    ("exporter", "make", "drafts", "form"),
    [
        pytest.param(OriginalExporter(), medusa, 3, "medusa (original)", id="medusa"),
        pytest.param(TensorrtLlmExporter(), medusa, 3, "medusa (original)", id="medusa-trt"),
        pytest.param(TgiExporter(), medusa, 3, "medusa (TGI)", id="medusa-tgi"),
        pytest.param(OriginalExporter(), hydra, 3, "hydra", id="hydra"),
        pytest.param(OriginalExporter(), kangaroo, 8, "kangaroo", id="kangaroo"),
        pytest.param(OriginalExporter(), eagle, 8, "eagle (SGLang)", id="eagle"),
    ],
)
def test_drafts_are_the_same(
    target: Target, tmp_path: Path, exporter: Exporter, make: Any, drafts: int, form: str
) -> None:
    drafter = make(target, draft_vocab_size=40)
    assert proven(exporter, drafter, target, tmp_path).tokens == CHAINS * drafts
    assert check_export(tmp_path) == form
    card = exporter.usage(target="owner/model", depths=drafter.num_depths)
    assert "owner/model" in card


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"prefix_layer": True}, id="prefix"),
        pytest.param({"prefix_layer": True, "num_layers": 2, "head": FROZEN}, id="plus-plus"),
        pytest.param({"num_layers": 2, "head": {**OWN, "bias": True}}, id="two-blocks"),
    ],
)
def test_hydras_variants(target: Target, tmp_path: Path, settings: dict[str, Any]) -> None:
    drafter = hydra(target, **settings)
    assert proven(OriginalExporter(), drafter, target, tmp_path).tokens == CHAINS * 3


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="tied-weights"),
        pytest.param({"tie_weights": False, "inner_dim": 48, "n_predict": 4}, id="of-its-own"),
        pytest.param({"head": TIED, "draft_vocab_size": 40}, id="tied-head"),
        pytest.param({"head": FROZEN, "draft_vocab_size": 40}, id="frozen-head"),
    ],
)
def test_mlp_speculators(target: Target, tmp_path: Path, settings: dict[str, Any]) -> None:
    drafter = mlp_speculator(target, **settings)
    steps = settings.get("n_predict", 3)
    assert proven(OriginalExporter(), drafter, target, tmp_path).tokens == CHAINS * steps
    assert check_export(tmp_path) == "mlp_speculator"


def test_tgi_does_not_scale_the_input(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scale_input=true"):
        TgiExporter().refuse(mlp_speculator(target))
    drafter = mlp_speculator(target, scale_input=False)
    assert proven(TgiExporter(), drafter, target, tmp_path).tokens == CHAINS * 3


def test_medusas_blocks_for_tgi(target: Target, tmp_path: Path) -> None:
    assert (
        proven(TgiExporter(), medusa(target, num_layers=2), target, tmp_path).tokens == CHAINS * 3
    )
    assert "architectures" not in read_config(tmp_path)


def test_names_and_plain_tensors(target: Target, tmp_path: Path) -> None:
    OriginalExporter().write(hydra(target, prefix_layer=True), tmp_path)
    file = tmp_path / "hydra_lm_head.pt"
    names = torch.load(file, weights_only=True).keys()
    assert {
        "hydra_mlp.0.1.linear.weight",
        "hydra_mlp.2.1.res_connection.bias",
        "hydra_lm_head.1.1.weight",
        "prefix_embeding_layer.layers.0.self_attn.q_proj.weight",
        "prefix_embeding_layer.layers.0.input_layernorm.weight",
        "prefix_embeding_layer.norm.weight",
    } <= names
    assert read_config(tmp_path)["hydra_head_arch"] == "prefix-mlp"


def test_kangaroos_layer_is_kept(target: Target, tmp_path: Path) -> None:
    drafter = kangaroo(target, shallow_layers=3)
    assert proven(OriginalExporter(), drafter, target, tmp_path).tokens == CHAINS * 8
    assert read_config(tmp_path)["early_stop_layer"] == 3
    names = set(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    projections = {f"layers.0.self_attn.{p}_proj.weight" for p in "qkvo"}
    assert names == projections | {"layers.0.input_layernorm.weight", "norm.weight"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda t: medusa(t, num_layers=2), "repeats one block"),
        (lambda t: hydra(t, num_layers=3), "repeats one block"),
        (lambda t: hydra(t, head=LOW_RANK), "has a LowRankHead"),
        (lambda t: kangaroo(t, head=OWN), "a vocabulary head of its own"),
        # of 4 layers the published code would read 2, 2 and 1
        (lambda t: eagle3(t), r"reads the layers \[2, 2, 1\]"),
    ],
)
def test_what_the_code_cannot_load_is_refused(target: Target, make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OriginalExporter().refuse(make(target))


def test_kangaroos_rotation_is_fixed(target: Target) -> None:
    drafter = kangaroo(target)
    drafter.adapter.attention.config.rope_parameters["rope_theta"] = 1e5
    with pytest.raises(ValueError, match="always with base 10000"):
        OriginalExporter().refuse(drafter)


def test_hydras_prefix_layer_has_the_targets_epsilon(target: Target) -> None:
    drafter = hydra(target, prefix_layer=True)
    drafter.prefix.norm.variance_epsilon = 1e-3
    with pytest.raises(ValueError, match=r"epsilon 0\.001"):
        OriginalExporter().refuse(drafter)


@pytest.mark.parametrize(
    ("exporter", "make", "file", "gone"),
    [
        (OriginalExporter(), medusa, "medusa_lm_head.pt", "1.0.linear.bias"),
        (TgiExporter(), medusa, "medusa_lm_head.safetensors", "2.1.weight"),
        (OriginalExporter(), hydra, "hydra_lm_head.pt", "hydra_mlp.1.0.res_connection.weight"),
        (OriginalExporter(), kangaroo, "pytorch_model.bin", "norm.weight"),
        (OriginalExporter(), mlp_speculator, "model.safetensors", "speculator.proj.1.weight"),
    ],
    ids=["medusa", "medusa-tgi", "hydra", "kangaroo", "mlp"],
)
def test_the_validator_misses_nothing(
    target: Target, tmp_path: Path, exporter: Exporter, make: Any, file: str, gone: str
) -> None:
    exporter.write(make(target), tmp_path)
    tensors = load_tensors(tmp_path)
    lost = tensors.pop(gone)
    assert lost.numel() > 0
    tensors["stray"] = torch.zeros(3)
    if file.endswith(".safetensors"):
        save_file(tensors, str(tmp_path / file))
    else:
        torch.save(tensors, tmp_path / file)
    with pytest.raises(ValueError, match="would not serve") as error:
        check_export(tmp_path)
    assert f"'{gone}' is missing" in str(error.value)
    assert "'stray' [3]" in str(error.value)
