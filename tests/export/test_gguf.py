"""Drafters as GGUF files: what is written, what a forward of the file alone drafts, what is refused
and what the validator finds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from export.check import check_export
from export.formats.gguf import FILE, tokenizer_of
from export.formats.gguf_file import interleave, rotation_factors, write_language_model
from export.formats.gguf_reader import GgufCheckpoint, GgufModel, Seen
from export.formats.gguf_tokenizer import pre_tokenizer
from export.gguf import GgufExporter
from export.hf import DrafterReader
from export.parity import prove_equal
from models.drafter.base import Drafter
from models.drafter.causal_lm import CausalLm
from models.drafter.eagle3 import Eagle3
from models.drafter.medusa import Medusa
from models.target import Target, plain_config
from tests.export.formats.drafters import FROZEN, LOW_RANK, OWN, eagle3
from tests.models.test_contract import stir


def causal_lm(target: Target, *, head: dict[str, Any] = OWN, layers: int = 3) -> CausalLm:
    torch.manual_seed(0)
    drafter = CausalLm(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_config=plain_config(target.config),
        num_layers=layers,
        head=head,
    )
    drafter.bind(target)
    drafter.init_from(target)
    stir(drafter)
    return drafter.eval()


def texts(target: Target) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, target.vocab_size, (n,), generator=generator) for n in (12, 30)]


def proven(exporter: GgufExporter, drafter: Drafter, target: Target, folder: Path) -> int:
    exporter.write(drafter, folder)
    assert check_export(folder) == check_export(folder / FILE) == "gguf"
    proof = prove_equal(
        trained=DrafterReader(drafter.float()),
        exported=exporter.read(folder, target),
        drafter=drafter,
        target=target,
        texts=texts(target),
    )
    return proof.tokens


KINDS: list[Any] = [
    pytest.param(eagle3, {}, id="eagle3"),
    pytest.param(eagle3, {"draft_vocab_size": None, "head": FROZEN}, id="eagle3-whole"),
    pytest.param(eagle3, {"norm_before_residual": True}, id="eagle3-residual"),
    pytest.param(eagle3, {"head": LOW_RANK}, id="eagle3-low-rank"),
    pytest.param(causal_lm, {}, id="causal_lm"),
    pytest.param(causal_lm, {"head": FROZEN}, id="causal_lm-frozen"),
]


@pytest.mark.parametrize(("make", "settings"), KINDS)
def test_the_file_alone_drafts_the_same(
    target: Target, tmp_path: Path, make: Callable[..., Drafter], settings: dict[str, Any]
) -> None:
    drafter = make(target, **settings)
    # 11 ends in the first text and 16 of the second; eight drafts each.
    assert proven(GgufExporter(), drafter, target, tmp_path) == 8 * (11 + 16)


def test_quantised_matrices_are_the_drafters_own(target: Target, tmp_path: Path) -> None:
    """The drafter is given the numbers that the file holds, so that drafts are equal and not merely
    alike."""
    exporter = GgufExporter(quantization="q8_0")
    trained = eagle3(target)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    drafter = exporter.cast(trained)
    assert isinstance(drafter, Eagle3)
    assert proven(exporter, drafter, target, tmp_path) == 8 * (11 + 16)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / FILE).tensors}
    assert kinds["output.weight"] == kinds["fc.weight"] == kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"
    # By hand: the largest of 32 becomes 127 steps, everything is within half a step of what it was.
    block = before["fc.weight"][3, 32:64]
    step = float(block.abs().max()) / 127
    moved = drafter.fc.weight.detach()[3, 32:64] - block
    assert 0 < float(moved.abs().max()) < 0.51 * step
    twice = drafter.fc.weight.detach().clone()
    exporter.cast(drafter)  # in place
    assert torch.equal(drafter.fc.weight, twice)


def test_what_is_not_quantised_is_refused(target: Target) -> None:
    exporter = GgufExporter(quantization="q8_0")
    with pytest.raises(ValueError, match=r"quantization=q8_0.*for EAGLE-3 only"):
        exporter.refuse(causal_lm(target))
    with pytest.raises(ValueError, match=r"has a FrozenHead, whose rows are not its own"):
        exporter.refuse(eagle3(target, head=FROZEN))
    with pytest.raises(ValueError, match=r"dtype=float16 and exporter\.quantization=q8_0"):
        GgufExporter(quantization="q8_0", dtype="float16")


def test_eagle3_layout(target: Target, tmp_path: Path) -> None:
    drafter = eagle3(target, feature_layers=[3, 1, 2])
    GgufExporter().write(drafter, tmp_path)
    file = GgufCheckpoint(tmp_path / FILE, torch.device("cpu"))
    assert file.arch == "eagle3"
    assert file.number("target_layers") == [1, 2, 3]
    assert file.number("vocab_size") == target.vocab_size
    assert file.number("target_hidden_size") == 32
    assert file.number("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert file.fields["draftsmith.target_fingerprint"] == target.fingerprint()
    assert drafter.draft_ids_D is not None
    assert torch.equal(file.tensors["d2t"], drafter.draft_ids_D)
    # fc reads ascending layers: our columns are those of layers 3, 1, 2.
    three, one, two = drafter.fc.weight.chunk(3, dim=1)
    assert torch.equal(file.tensors["fc.weight"], torch.cat([one, two, three], 1))
    assert file.tensors["blk.0.attn_q.weight"].shape == (32, 64)
    assert not {"token_embd.weight", "t2d"} & file.tensors.keys()


def test_rows_are_interleaved_by_hand() -> None:
    # Two heads of 4: in each, row 0 and 2 rotate together and row 1 and 3.
    rows = torch.arange(8)[:, None].float()
    assert interleave(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_scaling_as_factors() -> None:
    # Wavelength 2 pi / f beyond 8192 / 1: divided by 8; below 8192 / 4: untouched.
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    factors = rotation_factors(config)
    assert factors is not None
    assert factors.shape == (64,)
    torch.testing.assert_close(factors[:20], torch.ones(20), rtol=1e-5, atol=0)
    torch.testing.assert_close(factors[-20:], torch.full((20,), 8.0), rtol=1e-5, atol=0)
    # Frequency 32: 500000^-0.5 has wavelength 4443; s = (8192 / 4443 - 1) / 3 = 0.2813, and the
    # frequency is multiplied by (1 - s) / 8 + s = 0.3711.
    assert float(factors[32]) == pytest.approx(1 / 0.3711, rel=1e-3)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("kind", ["llama3-biased", "qwen3"])
def test_whole_models(target: Target, tmp_path: Path, kind: str) -> None:
    """Other architectures against transformers' own logits."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.3,
        "max_position_embeddings": 128,
    }
    if kind == "qwen3":
        model: Any = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    else:
        config = LlamaConfig(**shape, attention_bias=True, rope_parameters=LLAMA3)
        model = LlamaForCausalLM(config)
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias = None
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * torch.randn(p.shape))
    weights = model.state_dict()
    if kind == "qwen3":
        del weights["lm_head.weight"]
    file = tmp_path / FILE
    write_language_model(
        file,
        config=model.config,
        weights=weights,
        dtype="float32",
        tokenizer=tokenizer_of(target, target.vocab_size),
        about={},
    )
    assert check_export(tmp_path) == "gguf"
    tokens_T = texts(target)[1]
    with torch.inference_mode():
        want_TV = model.eval()(input_ids=tokens_T[None]).logits[0]
        reader, blocks = GgufModel(file, torch.device("cpu")), [Seen(), Seen()]
        # In two parts, so that rows after the first also look back.
        parts = [reader.logits(tokens_T[:20], 0, blocks), reader.logits(tokens_T[20:], 20, blocks)]
    torch.testing.assert_close(torch.cat(parts), want_TV, rtol=1e-4, atol=1e-4)


def test_a_permutation_left_out_is_not_proven(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.formats.gguf_file.interleave", lambda weight, head_dim: weight)
    with pytest.raises(ValueError, match="nothing was exported"):
        proven(GgufExporter(), eagle3(target), target, tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_and_compared_as_written(
    target: Target, tmp_path: Path, dtype: Any
) -> None:
    exporter = GgufExporter(dtype=dtype)
    drafter = exporter.cast(eagle3(target))
    proven(exporter, drafter, target, tmp_path)
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / FILE).tensors}
    assert kinds["blk.0.attn_q.weight"] == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert kinds["output_norm.weight"] == "F32"


def test_the_tokenizer_is_the_targets(target: Target, tmp_path: Path) -> None:
    GgufExporter().write(causal_lm(target, layers=1), tmp_path)
    fields = GgufCheckpoint(tmp_path / FILE, torch.device("cpu")).fields
    vocab = target.tokenizer.get_vocab()
    tokens = fields["tokenizer.ggml.tokens"]
    assert {text: i for i, text in enumerate(tokens)} == vocab
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # control, then normal
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.bos_token_id"] == target.tokenizer.bos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == target.tokenizer.chat_template


def test_the_tokenizer_of_a_given_file_is_copied(target: Target, tmp_path: Path) -> None:
    def given(name: str, tokens: int) -> str:
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list([f"t{i}" for i in range(tokens)])
        writer.add_token_types([1] * tokens)
        writer.add_token_scores([-float(i) for i in range(tokens)])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(tmp_path / name)

    out = tmp_path / "out"
    out.mkdir()
    drafter = eagle3(target)
    exporter = GgufExporter(target_gguf=given("target.gguf", target.vocab_size))
    assert proven(exporter, drafter, target, out) > 0
    fields = GgufCheckpoint(out / FILE, torch.device("cpu")).fields
    assert fields["tokenizer.ggml.tokens"][7] == "t7"
    assert fields["tokenizer.ggml.scores"][7] == -7.0
    with pytest.raises(ValueError, match=r"has 9 tokens and the target 320 rows"):
        GgufExporter(target_gguf=given("other.gguf", 9)).write(drafter, out)
    with pytest.raises(ValueError, match="is no file"):
        GgufExporter(target_gguf="nowhere.gguf")


BPE: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_pre_tokenizers_by_name() -> None:
    def split(pattern: str) -> dict[str, Any]:
        steps = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False},
        ]
        return {"model": BPE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}

    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]
    smollm = {"model": BPE, "pre_tokenizer": {"type": "Sequence", "pretokenizers": digits}}
    assert pre_tokenizer(smollm) == "smollm"
    assert pre_tokenizer(split(QWEN2)) == "qwen2"
    assert pre_tokenizer(split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"))) == "llama-bpe"
    with pytest.raises(ValueError, match=r"Split.*target_gguf"):
        pre_tokenizer(split(r"\w+"))
    with pytest.raises(ValueError, match=r"byte fallback.*target_gguf"):
        pre_tokenizer({"model": {**BPE, "byte_fallback": True}})


def test_what_it_cannot_serve_is_refused(target: Target) -> None:
    medusa = Medusa(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, num_heads=2, head=OWN
    )
    exporter = GgufExporter()
    with pytest.raises(ValueError, match=r"llama.cpp cannot serve Medusa: it has EAGLE-3"):
        exporter.refuse(medusa)
    with pytest.raises(ValueError, match="norm_output=false"):
        exporter.refuse(eagle3(target, norm_output=True))
    with pytest.raises(ValueError, match="bias=false"):
        exporter.refuse(eagle3(target, head={**OWN, "bias": True}))
    with pytest.raises(ValueError, match="gamma=0"):
        GgufExporter(gamma=0)


def rewrite(file: Path, *, fields: dict[str, Any] | None = None, **tensors: Any) -> None:
    """The same file with some fields (None: without) and tensors changed."""
    reader, fields = GGUFReader(file), fields or {}
    old = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    writer = GGUFWriter(file.with_suffix(".new"), old["general.architecture"].contents())
    for key, f in old.items():
        value = fields.get(key, f.contents())
        if value is not None and key != "general.architecture":
            kind = f.types[-1] if len(f.types) > 1 else None
            writer.add_key_value(key, value, f.types[0], sub_type=kind)
    for t in reader.tensors:
        given = tensors.pop(t.name, t.data)
        if given is not None:
            writer.add_tensor(t.name, np.ascontiguousarray(given))
    for name, given in tensors.items():
        writer.add_tensor(name, given)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").rename(file)


FAULTS: list[Any] = [
    pytest.param({}, {"d2t": np.arange(40) * 0}, "absolute ids", id="offsets"),
    pytest.param({}, {"d2t": np.arange(40) + 300}, "outside of the target's 320", id="range"),
    pytest.param({}, {"fc.weight": None}, "'fc.weight' is missing", id="missing"),
    pytest.param({}, {"fc.bias": np.zeros(32, "f4")}, r"'fc.bias' \[32\] belongs", id="stray"),
    pytest.param({}, {"output.weight": np.zeros((9, 32), "f4")}, r"shape \[9, 32\]", id="shape"),
    pytest.param(
        {}, {"output.weight": np.zeros((40, 32), "f2")}, "several precisions", id="precision"
    ),
    pytest.param({"eagle3.target_layers": [3, 1, 2]}, {}, "three ascending layers", id="layers"),
    pytest.param({"eagle3.norm_before_residual": None}, {}, "residual is missing", id="residual"),
    pytest.param({"eagle3.vocab_size": None}, {}, "vocab_size is missing", id="no-size"),
    pytest.param({"tokenizer.ggml.tokens": ["a"]}, {}, "tokens has 1 entries", id="tokens"),
    pytest.param({"tokenizer.ggml.merges": None}, {}, "merges is missing", id="merges"),
]


@pytest.mark.parametrize(("fields", "tensors", "complaint"), FAULTS)
def test_the_validator_names_each_fault(
    target: Target,
    tmp_path: Path,
    fields: dict[str, Any],
    tensors: dict[str, Any],
    complaint: str,
) -> None:
    GgufExporter().write(eagle3(target), tmp_path)
    rewrite(tmp_path / FILE)
    assert check_export(tmp_path) == "gguf"
    rewrite(tmp_path / FILE, fields=fields, **tensors)
    with pytest.raises(ValueError, match=complaint):
        check_export(tmp_path)


def test_a_file_that_is_no_drafter_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"GGUF but not really")
    with pytest.raises(ValueError, match="not a readable GGUF"):
        check_export(tmp_path)
