"""EAGLE-3 as the speculators library has it."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from export.check import check_export
from export.formats.base import read_config
from export.speculators import SpeculatorsExporter
from models.target import Target
from tests.export.formats.drafters import eagle3, proven


def test_drafts_are_the_same(target: Target, tmp_path: Path) -> None:
    exporter = SpeculatorsExporter(gamma=5, verifier="owner/model")
    drafter = eagle3(target, norm_before_residual=True)
    assert proven(exporter, drafter, target, tmp_path).tokens == (6 + 16) * 8
    assert check_export(tmp_path) == "speculators"


def test_layout(target: Target, tmp_path: Path) -> None:
    SpeculatorsExporter(gamma=5, verifier="owner/model").write(eagle3(target), tmp_path)
    config = read_config(tmp_path)
    assert "model_type" not in config
    assert config["speculators_model_type"] == "eagle3"
    assert config["architectures"] == ["Eagle3Speculator"]
    assert config["norm_before_residual"] is False
    assert config["draft_vocab_size"] == 40
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    proposal = config["speculators_config"]["proposal_methods"][0]
    assert (proposal["proposal_type"], proposal["speculative_tokens"]) == ("greedy", 5)
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "owner/model",
        "architectures": list(target.config.architectures or []),
    }
    inner = config["transformer_layer_config"]
    assert (inner["model_type"], inner["vocab_size"]) == ("llama", target.vocab_size)
    assert not {"draft_vocab_size", "norm_output", "eagle_config"} & inner.keys()
    tensors = load_file(tmp_path / "model.safetensors")
    names = tensors.keys()
    assert torch.equal(tensors["embed_tokens.weight"], target.embedding_weight_Vd)
    assert "layers.0.hidden_norm.weight" in names
    assert not any(n.startswith("midlayer") for n in names)
