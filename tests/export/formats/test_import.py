"""Published checkpoints as drafters of ours: out and in again, and folders of other tools."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from export.base import Exporter
from export.formats.base import read_config
from export.hf import DrafterReader
from export.original import OriginalExporter
from export.parity import prove_equal
from export.sglang import SglangExporter
from export.speculators import SpeculatorsExporter
from export.tgi import TgiExporter
from export.vllm import VllmExporter
from models.drafter.base import Drafter
from models.drafter.eagle3 import Eagle3
from models.target import Target
from scripts.import_drafter import find_format
from tests.export.formats.drafters import (
    FROZEN,
    OWN,
    eagle,
    eagle3,
    hydra,
    kangaroo,
    medusa,
    mlp_speculator,
    texts,
)

ROUND_TRIPS: list[Any] = [
    pytest.param(VllmExporter(), eagle3, id="eagle3"),
    pytest.param(
        VllmExporter(),
        lambda t: eagle3(t, norm_output=True, norm_before_residual=True, draft_vocab_size=None),
        id="eagle3-options",
    ),
    pytest.param(SpeculatorsExporter(), eagle3, id="speculators"),
    pytest.param(VllmExporter(), eagle, id="eagle-vllm"),
    pytest.param(SglangExporter(), eagle, id="eagle-sglang"),
    pytest.param(VllmExporter(), medusa, id="medusa-vllm"),
    pytest.param(TgiExporter(), lambda t: medusa(t, num_layers=2), id="medusa-tgi"),
    pytest.param(OriginalExporter(), medusa, id="medusa-original"),
    pytest.param(
        OriginalExporter(),
        lambda t: hydra(t, prefix_layer=True, num_layers=2, head={**OWN, "bias": True}),
        id="hydra",
    ),
    pytest.param(OriginalExporter(), mlp_speculator, id="mlp-speculator"),
    pytest.param(
        TgiExporter(),
        lambda t: mlp_speculator(t, tie_weights=False, inner_dim=48, scale_input=False),
        id="mlp-speculator-own",
    ),
    pytest.param(OriginalExporter(), lambda t: hydra(t, head={**OWN, "bias": True}), id="mlp"),
    pytest.param(OriginalExporter(), lambda t: kangaroo(t, shallow_layers=1), id="kangaroo"),
]


def imported(folder: Path, target: Target) -> Drafter:
    return find_format(folder).load(folder, target)


@pytest.mark.parametrize(("exporter", "make"), ROUND_TRIPS)
def test_out_and_in_again(
    target: Target, tmp_path: Path, exporter: Exporter, make: Callable[[Target], Drafter]
) -> None:
    drafter = make(target)
    exporter.write(drafter, tmp_path)
    back = imported(tmp_path, target)
    assert type(back) is type(drafter)
    assert back.draft_vocab_size == drafter.draft_vocab_size
    ours, theirs = drafter.state_dict(), back.state_dict()
    if isinstance(drafter, Eagle3):
        # the file has the layers in ascending order
        assert back.feature_layers == (1, 2, 3)
        two, one, three = ours["fc.weight"].split(target.hidden_size, dim=1)
        ours["fc.weight"] = torch.cat([one, two, three], dim=1)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    proof = prove_equal(
        trained=DrafterReader(drafter),
        exported=DrafterReader(back),
        drafter=drafter,
        target=target,
        texts=texts(target),
    )
    assert proof.chains == 6 + 16


def edit(folder: Path, *, config: Any = None, **tensors: Any) -> None:
    """Change fields (None deletes) and tensors of an exported folder."""
    file = folder / "model.safetensors"
    kept: dict[str, Any] = {**load_file(file), **tensors}
    save_file({k: v.clone() for k, v in kept.items() if v is not None}, str(file))
    fields = {**read_config(folder), **(config or {})}
    fields = {k: v for k, v in fields.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))


def test_the_published_layout_of_eagle3(target: Target, tmp_path: Path) -> None:
    """A plain architecture, no layer ids, torch pickle: what the authors' folders look like."""
    drafter = eagle3(target, feature_layers=[1, 2, 3])
    VllmExporter().write(drafter, tmp_path)
    eagle_ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}
    absent = ("eagle_aux_hidden_state_layer_ids", "norm_before_residual", "norm_output", "fc_norm")
    changes: dict[str, Any] = {**eagle_ids, "architectures": ["LlamaForCausalLM"]}
    edit(tmp_path, config=changes | dict.fromkeys(absent))
    tensors = load_file(tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    back = imported(tmp_path, target)
    assert isinstance(back, Eagle3)
    assert back.feature_layers == (1, 2, 3)
    assert torch.equal(back.layer.self_attn.q_proj.weight, drafter.layer.self_attn.q_proj.weight)


def test_a_draft_vocabulary_in_any_order(target: Target, tmp_path: Path) -> None:
    drafter = eagle3(target)
    VllmExporter().write(drafter, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    places = torch.arange(40)
    ids_D, order = places + tensors["d2t"], torch.randperm(40)
    shuffled = {"d2t": ids_D[order] - places, "lm_head.weight": tensors["lm_head.weight"][order]}
    edit(tmp_path, **shuffled)
    back = imported(tmp_path, target)
    assert torch.equal(back.state_dict()["draft_ids_D"], ids_D)
    assert torch.equal(
        back.state_dict()["lm_head.linear.weight"], drafter.state_dict()["lm_head.linear.weight"]
    )


@pytest.mark.parametrize(
    ("config", "tensors", "sentence"),
    [
        ({"fc_norm": True}, {}, "fc_norm"),
        ({"num_hidden_layers": 2}, {}, "num_hidden_layers=2"),
        ({}, {"mask_hidden": torch.ones(1, 1, 96)}, "without a place here mask_hidden"),
        ({}, {"norm.weight": torch.ones(3)}, r"norm.weight \[3\] in place of \[32\]"),
        ({}, {"embed_tokens.weight": torch.ones(9, 32)}, "not the one of"),
        ({}, {"d2t": torch.arange(40) * 8}, "absolute ids"),
    ],
)
def test_what_cannot_be_imported_says_why(
    target: Target, tmp_path: Path, config: Any, tensors: Any, sentence: str
) -> None:
    VllmExporter().write(eagle3(target), tmp_path)
    edit(tmp_path, config=config, **tensors)
    with pytest.raises(ValueError, match=sentence):
        imported(tmp_path, target)


def test_the_targets_own_embedding_is_left_out(target: Target, tmp_path: Path) -> None:
    VllmExporter().write(eagle(target), tmp_path)
    edit(tmp_path, **{"embed_tokens.weight": target.embedding_weight_Vd.clone()})
    assert "embed_tokens.weight" not in imported(tmp_path, target).state_dict()


def test_a_language_model(target: Target, tmp_path: Path) -> None:
    small = dict(target.plain_config) | {"num_hidden_layers": 1, "hidden_size": 16}
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig.from_dict(small))
    model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    back = imported(tmp_path, target)
    ids = texts(target)[1][None]
    with torch.inference_mode():
        depth = list(back.unroll(target.forward(ids), ids))[-1]
        got = depth.head(depth.states_BNd)
        want = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_other_folders_are_named(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        find_format(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="no drafter that can be imported"):
        find_format(tmp_path)
    eagle3(target, head=FROZEN).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one of our own"):
        find_format(tmp_path)


def test_a_pickle_with_code_is_not_run(target: Target, tmp_path: Path) -> None:
    OriginalExporter().write(medusa(target), tmp_path)

    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    torch.save({"0.0.linear.weight": Evil()}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        imported(tmp_path, target)
