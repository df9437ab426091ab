"""Faults that engines pass over in silence, each caught by `python -m export check=<folder>`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.check import check_export
from export.formats.base import read_config
from export.sglang import SglangExporter
from export.speculators import SpeculatorsExporter
from export.tensors import map_problems
from export.vllm import VllmExporter
from models.target import Target
from tests.export.formats.drafters import eagle, eagle3

IDS = "eagle_aux_hidden_state_layer_ids"
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def spoil(folder: Path, change: Change) -> None:
    """Edit config.json and the tensors of a folder in place."""
    file = folder / "model.safetensors"
    config, tensors = read_config(folder), load_file(file)
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, str(file))


def absolute(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["d2t"] = tensors["d2t"] + torch.arange(len(tensors["d2t"]))


def absolute_alone(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    absolute(config, tensors)
    del tensors["t2d"]


def other_map(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["t2d"] = tensors["t2d"].roll(1)


def biased(name: str, size: int) -> Change:
    return lambda config, tensors: tensors.update({name: torch.zeros(size)})


def four_layers(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A folder with four features and no count: an engine would build fc for three."""
    config[IDS], config["eagle_config"][IDS] = [1, 2, 3, 4], [0, 1, 2, 3]
    del config["num_aux_hidden_states"]
    tensors["fc.weight"] = torch.ones(32, 4 * 32)


NATIVE: list[Any] = [
    pytest.param(absolute, "d2t holds absolute ids", id="absolute-d2t"),
    pytest.param(absolute_alone, "d2t holds absolute ids", id="absolute-d2t-without-t2d"),
    pytest.param(other_map, "d2t and t2d name different", id="t2d-of-another-vocabulary"),
    pytest.param(
        lambda c, t: c.pop("norm_before_residual"), "no 'norm_before_residual'", id="residual"
    ),
    pytest.param(
        lambda c, t: c.update({IDS: [0, 1, 2]}), "expected .-1, 0, 1.", id="other-convention"
    ),
    pytest.param(
        lambda c, t: c["eagle_config"].update({IDS: [1, 2, 3]}), "different layers", id="shifted"
    ),
    pytest.param(lambda c, t: c.pop(IDS), "stands inside eagle_config", id="one-field"),
    pytest.param(lambda c, t: c.pop("eagle_config"), "stands at the top: SGLang", id="top-alone"),
    pytest.param(
        lambda c, t: (c.pop(IDS), c.pop("eagle_config")), "stands nowhere", id="no-layer-ids"
    ),
    pytest.param(
        lambda c, t: (c.update({IDS: [3, 2, 1]}), c["eagle_config"].update({IDS: [2, 1, 0]})),
        "expected ascending",
        id="descending",
    ),
    pytest.param(biased("fc.bias", 32), r"'fc.bias' \[32\] belongs to no part", id="fc-bias"),
    pytest.param(
        biased("midlayer.self_attn.q_proj.bias", 32), r"q_proj.bias.*no part", id="attention-bias"
    ),
    pytest.param(
        lambda c, t: c.pop("num_aux_hidden_states"), "no 'num_aux_hidden_states'", id="count"
    ),
    pytest.param(four_layers, "no 'num_aux_hidden_states', for which engines take 3", id="four"),
    pytest.param(lambda c, t: c.pop("vocab_size"), "no 'vocab_size'.*32,000", id="vocab-size"),
    pytest.param(lambda c, t: c.pop("draft_vocab_size"), "no 'draft_vocab_size'", id="draft-size"),
    pytest.param(
        lambda c, t: (c.pop("rope_theta"), c.pop("rope_parameters")), "no rope_theta", id="rope"
    ),
    pytest.param(lambda c, t: c.pop("rms_norm_eps"), "no rms_norm_eps", id="epsilon"),
    pytest.param(lambda c, t: c.update(num_hidden_layers=2), "expected 1", id="two-layers"),
    pytest.param(
        lambda c, t: t.update({"lm_head.weight": t["lm_head.weight"].half()}),
        "several precisions",
        id="precision",
    ),
    pytest.param(
        lambda c, t: t.update({"mask_hidden": torch.ones(1, 1, 96)}), "'mask_hidden'", id="stray"
    ),
    pytest.param(lambda c, t: t.pop("norm.weight"), "'norm.weight' is missing", id="missing"),
    pytest.param(lambda c, t: c.update(norm_output="no"), "expected true or false", id="flag"),
]


@pytest.mark.parametrize(("change", "sentence"), NATIVE)
def test_eagle3(target: Target, tmp_path: Path, change: Change, sentence: str) -> None:
    VllmExporter().write(eagle3(target), tmp_path)
    assert check_export(tmp_path) == "eagle3"
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        check_export(tmp_path)


def test_other_tools_name_the_layer_otherwise(target: Target, tmp_path: Path) -> None:
    def rename(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        tensors["embed_tokens.weight"] = target.embedding_weight_Vd.clone()
        del tensors["t2d"]

    VllmExporter().write(eagle3(target), tmp_path)
    spoil(tmp_path, rename)
    assert check_export(tmp_path) == "eagle3"


def test_a_map_beside_a_whole_vocabulary(target: Target, tmp_path: Path) -> None:
    VllmExporter().write(eagle3(target, draft_vocab_size=None), tmp_path)
    spoil(tmp_path, lambda c, t: t.update(d2t=torch.zeros(target.vocab_size, dtype=torch.long)))
    with pytest.raises(ValueError, match="'d2t'"):
        check_export(tmp_path)


def test_missing_tokenizer_files(target: Target, tmp_path: Path) -> None:
    VllmExporter().write(eagle3(target), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        check_export(tmp_path)


SPECULATORS: list[Any] = [
    pytest.param(
        lambda c, t: c.pop("norm_before_residual"),
        "vLLM takes true and speculators false",
        id="residual",
    ),
    pytest.param(absolute, "d2t holds absolute ids", id="absolute-d2t"),
    pytest.param(lambda c, t: c.update({IDS: None}), "takes its own default", id="layer-ids"),
    pytest.param(lambda c, t: c.pop("draft_vocab_size"), "no 'draft_vocab_size'", id="draft-size"),
    pytest.param(
        lambda c, t: c["transformer_layer_config"].pop("vocab_size"), "no 'vocab_size'", id="vocab"
    ),
    pytest.param(
        lambda c, t: c["speculators_config"]["verifier"].update(name_or_path=None),
        "names no verifier",
        id="verifier",
    ),
    pytest.param(
        lambda c, t: c["speculators_config"].update(proposal_methods=[]),
        "how many tokens to draft",
        id="tokens",
    ),
    pytest.param(biased("fc.bias", 32), r"'fc.bias' \[32\]", id="fc-bias"),
    pytest.param(
        lambda c, t: t.pop("embed_tokens.weight"), "'embed_tokens.weight' is mis", id="embedding"
    ),
    pytest.param(
        lambda c, t: c.update(speculators_model_type="xpress"), "is 'xpress'", id="unknown"
    ),
    pytest.param(
        lambda c, t: c.update(speculators_model_type="peagle"), "no 'mask_token_id'", id="peagle"
    ),
]


@pytest.mark.parametrize(("change", "sentence"), SPECULATORS)
def test_speculators(target: Target, tmp_path: Path, change: Change, sentence: str) -> None:
    SpeculatorsExporter(verifier="owner/model").write(eagle3(target), tmp_path)
    assert check_export(tmp_path) == "speculators"
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        check_export(tmp_path)


@pytest.mark.parametrize(
    ("exporter", "change", "sentence"),
    [
        (VllmExporter, biased("fc.bias", 32), r"'fc.bias' \[32\]"),
        (VllmExporter, biased("layers.0.input_layernorm.weight", 32), "input_layernorm"),
        (VllmExporter, lambda c, t: c.update(attention_bias=False), r"q_proj.bias.*no part"),
        (SglangExporter, lambda c, t: t.pop("fc.bias"), "'fc.bias' is missing"),
        (SglangExporter, lambda c, t: c.pop("vocab_size"), "no 'vocab_size'"),
    ],
)
def test_eagle(
    target: Target, tmp_path: Path, exporter: Any, change: Change, sentence: str
) -> None:
    exporter().write(eagle(target), tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        check_export(tmp_path)


DFLASH = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-6,
}
"""The layers of a folder that another tool wrote."""


def dflash_folder(folder: Path, kind: str) -> None:
    d = 16
    tensors = {"fc.weight": (d, 3 * d), "hidden_norm.weight": (d,), "norm.weight": (d,)}
    for i in range(2):
        base = f"layers.{i}"
        tensors |= {f"{base}.self_attn.{n}_norm.weight": (8,) for n in "qk"}
        tensors |= {f"{base}.self_attn.{n}_proj.weight": (8, d) for n in "kv"}
        tensors |= {f"{base}.self_attn.{n}_proj.weight": (d, d) for n in "qo"}
        tensors |= {f"{base}.mlp.{n}_proj.weight": (24, d) for n in ("gate", "up")}
        tensors[f"{base}.mlp.down_proj.weight"] = (d, 24)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}.{norm}.weight"] = (d,)
    save_file({n: torch.ones(s) for n, s in tensors.items()}, str(folder / "model.safetensors"))
    if kind == "native":
        config: dict[str, Any] = {
            "architectures": ["DFlashDraftModel"],
            **DFLASH,
            "block_size": 8,
            "dflash_config": {"mask_token_id": 3, "target_layer_ids": [1, 14, 26]},
        }
    else:
        proposal = {"proposal_type": "greedy", "speculative_tokens": 7}
        config = {
            "architectures": ["DFlashSpeculator"],
            "speculators_model_type": "dflash",
            "draft_vocab_size": 50,
            "block_size": 8,
            "mask_token_id": 3,
            "aux_hidden_state_layer_ids": [2, 15, 27],
            "sliding_window_non_causal": True,
            "speculators_config": {
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": "owner/model"},
            },
            "transformer_layer_config": DFLASH,
        }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        (
            "speculators",
            lambda c, t: c.update(sliding_window_non_causal=False),
            "every layer causal",
        ),
        ("speculators", lambda c, t: c.pop("sliding_window_non_causal"), "takes true and specul"),
        ("speculators", lambda c, t: c.pop("mask_token_id"), "no 'mask_token_id'"),
        ("native", lambda c, t: c["dflash_config"].update(causal=True), "causal is true"),
        ("native", lambda c, t: c.pop("vocab_size"), "no 'vocab_size'"),
        ("native", lambda c, t: t.update(mask_hidden=torch.ones(1)), "vLLM stops at mask_hidden"),
        ("native", lambda c, t: t.pop("layers.1.self_attn.q_norm.weight"), "q_norm.weight' is mis"),
    ],
)
def test_dflash(tmp_path: Path, kind: str, change: Change, sentence: str) -> None:
    dflash_folder(tmp_path, kind)
    assert check_export(tmp_path) == {"native": "dflash"}.get(kind, "speculators")
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        check_export(tmp_path)


def test_layers_with_windows_may_be_causal(tmp_path: Path) -> None:
    dflash_folder(tmp_path, "speculators")
    windows = {**DFLASH, "layer_types": ["sliding_attention"] * 2}
    spoil(
        tmp_path,
        lambda c, t: c.update(sliding_window_non_causal=False, transformer_layer_config=windows),
    )
    assert check_export(tmp_path) == "speculators"


def test_maps_by_hand() -> None:
    # ids 0, 1, 4, 5: offsets 0, 0, 2, 2
    kept = torch.tensor([1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    offsets, ids = torch.tensor([0, 0, 2, 2]), torch.tensor([0, 1, 4, 5])
    assert map_problems(offsets, kept, 7) == []
    assert map_problems(offsets, None, 7) == []
    assert "absolute" in map_problems(ids, kept, 7)[0]
    assert "absolute" in map_problems(ids, None, 7)[0]
    assert "different target ids" in map_problems(torch.tensor([0, 0, 1, 2]), kept, 7)[0]
    assert "one a target id" in map_problems(offsets, kept[:5], 7)[0]
    assert "outside of the target's" in map_problems(torch.tensor([0, 0, 2, 9]), None, 7)[0]
    # the order of ids is free, a repeated one is not
    assert map_problems(torch.tensor([4, 4, -2, -2]), kept, 7) == []
    assert "not strictly ascending" in map_problems(torch.tensor([0, -1, 0, 0]), None, 7)[0]
