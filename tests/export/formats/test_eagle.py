"""EAGLE-3 and EAGLE-1 folders: layout, equal drafts, what has no place in them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from export.check import check_export
from export.formats.base import read_config
from export.sglang import SglangExporter
from export.vllm import VllmExporter
from models.drafter.eagle import Eagle
from models.drafter.hass import Hass
from models.target import Target
from tests.export.formats.drafters import (
    FROZEN,
    LOW_RANK,
    OWN,
    eagle,
    eagle3,
    hass,
    proven,
)

CHAINS = 6 + 16
"""Ends in the two texts; 8 drafts each."""


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="own-head-reduced"),
        pytest.param({"draft_vocab_size": None}, id="whole"),
        pytest.param({"head": FROZEN}, id="frozen-reduced"),
        pytest.param({"head": LOW_RANK}, id="low-rank"),
        pytest.param({"norm_output": True}, id="norm-output"),
        pytest.param({"norm_before_residual": True}, id="normed-residual"),
    ],
)
def test_eagle3_drafts_the_same(target: Target, tmp_path: Path, settings: dict[str, Any]) -> None:
    proof = proven(VllmExporter(), eagle3(target, **settings), target, tmp_path)
    assert (proof.chains, proof.tokens) == (CHAINS, CHAINS * 8)
    assert check_export(tmp_path) == "eagle3"


def test_one_eagle3_folder_names_everything_engines_guess(target: Target, tmp_path: Path) -> None:
    drafter = eagle3(target)
    VllmExporter(dtype="bfloat16").write(drafter.to(torch.bfloat16), tmp_path)
    config = read_config(tmp_path)
    wanted = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": target.vocab_size,
        "draft_vocab_size": 40,
        "target_hidden_size": 32,
        "num_aux_hidden_states": 3,
        "num_hidden_layers": 1,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "attention_bias": False,
        "rms_norm_eps": target.config.rms_norm_eps,
        "rope_theta": 10_000.0,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {k: config[k] for k in wanted} == wanted
    # the index of the layer whose output it is: one less than the layers before the feature
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    tensors = load_file(tmp_path / "model.safetensors")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    assert shapes == {
        "fc.weight": (32, 96),
        "midlayer.self_attn.q_proj.weight": (32, 64),
        "midlayer.self_attn.k_proj.weight": (16, 64),
        "midlayer.self_attn.v_proj.weight": (16, 64),
        "midlayer.self_attn.o_proj.weight": (32, 32),
        "midlayer.mlp.gate_proj.weight": (64, 32),
        "midlayer.mlp.up_proj.weight": (64, 32),
        "midlayer.mlp.down_proj.weight": (32, 64),
        "midlayer.hidden_norm.weight": (32,),
        "midlayer.input_layernorm.weight": (32,),
        "midlayer.post_attention_layernorm.weight": (32,),
        "norm.weight": (32,),
        "lm_head.weight": (40, 32),
        "d2t": (40,),
        "t2d": (target.vocab_size,),
    }
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    ids_D = drafter.draft_ids_D
    assert ids_D is not None
    assert torch.equal(tensors["d2t"] + torch.arange(40), ids_D)
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids_D)
    # the drafter reads layers 2, 1, 3; the file 1, 2, 3
    two, one, three = drafter.fc.weight.split(32, dim=1)
    assert torch.equal(tensors["fc.weight"], torch.cat([one, two, three], dim=1))
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("family", [Eagle, Hass])
@pytest.mark.parametrize("exporter", [VllmExporter, SglangExporter])
def test_eagle_drafts_the_same(target: Target, tmp_path: Path, family: Any, exporter: Any) -> None:
    drafter = hass(target) if family is Hass else eagle(target)
    assert bool((drafter.fc.bias != 0).all())  # the bias that vLLM's fc has no place for
    assert proven(exporter(), drafter, target, tmp_path).tokens == CHAINS * 8
    assert check_export(tmp_path).startswith("eagle")


def test_the_bias_of_fc_moves_into_the_attention(target: Target, tmp_path: Path) -> None:
    drafter = eagle(target)
    VllmExporter().write(drafter, tmp_path)
    config, tensors = read_config(tmp_path), load_file(tmp_path / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is True
    assert "fc.bias" not in tensors
    assert "layers.0.input_layernorm.weight" not in tensors
    # W_q (C [e; f] + c), with and without the bias where the file has it
    joined = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    q = "layers.0.self_attn.q_proj"
    inner = F.linear(joined, tensors["fc.weight"])
    got = F.linear(inner, tensors[f"{q}.weight"], tensors[f"{q}.bias"])
    torch.testing.assert_close(got, drafter.layer.self_attn.q_proj(drafter.fc(joined)))
    assert torch.equal(tensors["layers.0.self_attn.o_proj.bias"], drafter.fc.bias)


def test_a_part_of_the_vocabulary_is_written_as_the_whole(target: Target, tmp_path: Path) -> None:
    """Engines draft with the target's head: over all tokens, which the same weights can do."""
    drafter = eagle(target, draft_vocab_size=40)
    exporter = VllmExporter()
    whole = exporter.cast(drafter)
    assert whole.draft_vocab_size is None
    assert torch.equal(whole.fc.weight, drafter.fc.weight)  # type: ignore[union-attr]
    assert proven(exporter, drafter, target, tmp_path).tokens == CHAINS * 8


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda t: eagle(t, head=OWN), "a vocabulary head of its own"),
        (lambda t: eagle3(t, head={**OWN, "bias": True}), "head has a bias"),
        (lambda t: eagle3(t, feature_layers=[0, 1, 2]), r"reads the layers \[0, 1, 2\]"),
        (lambda t: eagle3(t, feature_layers=[1, 1, 2]), r"reads the layers \[1, 1, 2\]"),
    ],
)
def test_what_has_no_place_is_refused(
    target: Target, tmp_path: Path, made: Any, sentence: str
) -> None:
    for exporter in (VllmExporter(), SglangExporter()):
        with pytest.raises(ValueError, match=sentence):
            exporter.write(made(target), tmp_path)


def test_sglang_has_no_normed_residual(target: Target) -> None:
    with pytest.raises(ValueError, match="un-normed feature as the residual"):
        SglangExporter().refuse(eagle3(target, norm_before_residual=True))


def test_partial_rotation_and_scaled_embeddings_are_refused(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = eagle3(target)
    drafter.layer.self_attn.config.rope_parameters["partial_rotary_factor"] = 0.5  # type: ignore[index]
    with pytest.raises(ValueError, match="rotates a part"):
        VllmExporter().refuse(drafter)
    drafter = eagle3(target)
    monkeypatch.setattr(target, "embed", lambda ids: 3.0 * target.embedding_weight_Vd[ids])
    with pytest.raises(ValueError, match="scales its token embeddings"):
        VllmExporter().refuse(drafter)
