"""A small language model as a plain transformers folder: what is written, what transformers alone
drafts with it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.check import schema
from data_prep.prompts import Prompt
from export.__main__ import export
from export.assistant import AssistantExporter
from export.check import check_export
from export.hf import DrafterReader
from export.outside import outside_mass, outside_row, widen
from export.parity import prove_equal
from models.drafter.causal_lm import CausalLm
from models.drafter.medusa import Medusa
from models.target import Target, plain_config
from tests.export.here import measure_here
from tests.export.tiny_run import write_run
from tests.tiny import tiny_target

OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}
TIED = {"_target_": "models.head.tied.TiedHead"}


@pytest.fixture(scope="module")
def leaning() -> Target:
    """A target whose states share a direction, as those of trained models do, and whose head is
    its embedding."""
    made = tiny_target(7)
    with torch.no_grad():
        made.embedding_weight_Vd.add_(0.3)
    made.model.lm_head.weight = made.embedding_weight_Vd
    made.config.tie_word_embeddings = True
    return made


def causal_lm(
    target: Target,
    *,
    head: dict[str, Any],
    embedding: Any = "target",
    size: int | None = None,
    layers: int = 4,
) -> CausalLm:
    """The target's first layers, a little disturbed: its drafts are right now and then."""
    drafter = CausalLm(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_config=plain_config(target.config),
        num_layers=layers,
        embedding=embedding,
        draft_vocab_size=size,
        head=head,
    )
    generator = torch.Generator().manual_seed(0)
    if size is not None:
        drafter.set_vocab(torch.randperm(target.vocab_size, generator=generator)[:size])
    drafter.bind(target)
    drafter.init_from(target)
    with torch.no_grad():
        for p in drafter.parameters():
            p.add_(0.03 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return drafter.eval()


def texts(target: Target, count: int = 2, length: int = 30) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, target.vocab_size, (length,), generator=generator) for _ in range(count)
    ]


def prompts(target: Target, count: int = 5) -> list[Prompt]:
    return [Prompt(str(i), text.tolist(), "") for i, text in enumerate(texts(target, count, 12))]


KINDS = [
    pytest.param(OWN, "target", None, id="own-head"),
    pytest.param(FROZEN, "target", None, id="frozen-head"),
    pytest.param(OWN, "own", None, id="own-embedding"),
    pytest.param(TIED, "own", None, id="tied"),
    pytest.param(OWN, "target", 200, id="own-head-reduced"),
    pytest.param(FROZEN, "target", 200, id="frozen-head-reduced"),
    pytest.param(TIED, "own", 200, id="tied-reduced"),
]


@pytest.mark.parametrize(("head", "embedding", "size"), KINDS)
def test_transformers_alone_drafts_the_same(
    leaning: Target, tmp_path: Path, head: dict[str, Any], embedding: str, size: int | None
) -> None:
    drafter = causal_lm(leaning, head=head, embedding=embedding, size=size)
    exporter = AssistantExporter(gamma=3)
    # Looked at and proven on different texts.
    exporter.write(drafter, tmp_path, texts=texts(leaning, 8, 60)[2:])
    assert check_export(tmp_path) == "assistant"
    proof = prove_equal(
        trained=DrafterReader(drafter),
        exported=exporter.read(tmp_path, leaning),
        drafter=drafter,
        target=leaning,
        texts=texts(leaning),
    )
    assert proof.tokens == 2 * 16 * 8  # texts, ends, drafts
    figures = exporter.compare(tmp_path, drafter=drafter, target=leaning, texts=texts(leaning))
    assert figures["positions"] == 60
    assert figures["largest_logit_difference"] < 1e-4
    assert ("largest_outside_mass" in figures) == (size is not None)
    assert figures.get("largest_outside_mass", 0.0) < 1e-6

    result = measure_here(
        tmp_path,
        drafter=drafter,
        target=leaning,
        prompts=prompts(leaning),
        gamma=3,
        max_new_tokens=22,
    )
    assert (result.own_texts, result.same_texts, result.same_rounds) == (5, 5, 5)
    assert result.difference == 0.0
    # The comparison would see a wrong count: some drafts are accepted and some are not.
    assert 1.0 < result.engine_tau < 4.0


def test_the_folder_is_a_plain_model(leaning: Target, tmp_path: Path) -> None:
    drafter = causal_lm(leaning, head=TIED, embedding="own", layers=2)
    AssistantExporter(gamma=3).write(drafter, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] == 2
    assert config["tie_word_embeddings"] is True
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "lm_head.weight" not in names
    assert {n.split(".")[2] for n in names if n.startswith("model.layers.")} == {"0", "1"}
    knobs = json.loads((tmp_path / "generation_config.json").read_text())
    assert knobs["num_assistant_tokens"] == 3
    assert knobs["num_assistant_tokens_schedule"] == "constant"
    assert knobs["assistant_confidence_threshold"] == 0.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == leaning.tokenizer.get_vocab()
    assert tokenizer.chat_template == leaning.tokenizer.chat_template

    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens_1T = texts(leaning)[0][None]
    with torch.inference_mode():
        logits_TV = model(input_ids=tokens_1T).logits[0]
        want_TV = drafter.head(0)(drafter.read(tokens_1T))[0]
    torch.testing.assert_close(logits_TV, want_TV, rtol=1e-4, atol=1e-4)


def test_a_trained_head_is_not_tied(leaning: Target, tmp_path: Path) -> None:
    drafter = causal_lm(leaning, head=OWN)
    AssistantExporter().write(drafter, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], leaning.embedding_weight_Vd)
    assert torch.equal(tensors["lm_head.weight"], drafter.head(0).linear.weight)  # type: ignore[union-attr]


def test_a_copy_of_the_target_is_always_accepted(target: Target, tmp_path: Path) -> None:
    drafter = causal_lm(target, head=FROZEN, layers=4)
    with torch.no_grad():
        drafter.init_from(target)
    exporter = AssistantExporter(gamma=3)
    exporter.write(drafter, tmp_path)
    result = measure_here(
        tmp_path,
        drafter=drafter,
        target=target,
        prompts=prompts(target, 2),
        gamma=3,
        max_new_tokens=23,
    )
    # 22 tokens after the first, four a round: five full rounds and one of two.
    assert result.engine_tau == pytest.approx(22 / 6)
    assert result.reference_tau == pytest.approx(22 / 6)


@pytest.mark.parametrize("fault", ["layer", "shift"])
def test_a_wrong_export_is_caught(leaning: Target, tmp_path: Path, fault: str) -> None:
    drafter = causal_lm(leaning, head=OWN)
    exporter = AssistantExporter(gamma=3)
    exporter.write(drafter, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if fault == "layer":
        tensors["model.layers.1.self_attn.o_proj.weight"].neg_()
    else:  # every token one row off
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ValueError, match="nothing was exported"):
        prove_equal(
            trained=DrafterReader(drafter),
            exported=exporter.read(tmp_path, leaning),
            drafter=drafter,
            target=leaning,
            texts=texts(leaning),
        )
    with pytest.raises(ValueError, match="logits differ"):
        exporter.compare(tmp_path, drafter=drafter, target=leaning, texts=texts(leaning))
    # The text stays the target's own, so that only the tokens per step tell.
    with pytest.raises(ValueError, match=r"5 of 5 texts are the engine's own.*more than 2%"):
        measure_here(
            tmp_path,
            drafter=drafter,
            target=leaning,
            prompts=prompts(leaning),
            gamma=3,
            max_new_tokens=22,
        )


def test_another_draft_length_is_caught(leaning: Target, tmp_path: Path) -> None:
    drafter = causal_lm(leaning, head=OWN)
    AssistantExporter(gamma=1).write(drafter, tmp_path)
    with pytest.raises(ValueError, match="more than 2%"):
        measure_here(
            tmp_path,
            drafter=drafter,
            target=leaning,
            prompts=prompts(leaning),
            gamma=4,
            max_new_tokens=22,
        )


def test_a_penalty_of_the_target_is_set_aside(tmp_path: Path) -> None:
    target = tiny_target(5)
    target.model.generation_config.repetition_penalty = 3.0
    drafter = causal_lm(target, head=OWN)
    exporter = AssistantExporter()
    exporter.write(drafter, tmp_path)
    assert "repetition_penalty" not in (tmp_path / "generation_config.json").read_text()
    result = measure_here(
        tmp_path,
        drafter=drafter,
        target=target,
        prompts=prompts(target, 2),
        gamma=4,
        max_new_tokens=20,
    )
    assert result.own_texts == result.same_texts == 2
    assert target.model.generation_config.repetition_penalty == 3.0


def test_outside_rows_by_hand() -> None:
    # d=2, states near (1, 0): m is about (1, 0). One draft id with logit 0: Z = 1, and with two
    # rows outside c = 4 log(2 / 1e-6) / min(m.y) = 4 * 14.509 / 1 = 58.03.
    states_Nd = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    row_d = outside_row(states_Nd, torch.zeros(2, 1), outside=2)
    torch.testing.assert_close(row_d, torch.tensor([-58.0346, 0.0]), rtol=1e-3, atol=1e-3)
    wide_Vd = widen(torch.zeros(1, 2), torch.tensor([1]), 3, row_d)
    assert torch.equal(wide_Vd, torch.stack([row_d, torch.zeros(2), row_d]))
    # q outside = 2 e^-58 / (1 + 2 e^-58)
    mass_N = outside_mass(states_Nd @ wide_Vd.T, torch.tensor([1]))
    torch.testing.assert_close(
        mass_N.log(), torch.full((2,), -58.0346 + 0.6931).double(), rtol=1e-4, atol=1e-2
    )
    # Two logits of 0 inside and one of 0 outside: a third.
    third_N = outside_mass(torch.zeros(1, 3), torch.tensor([0, 2]))
    assert third_N.item() == pytest.approx(1 / 3)


def test_states_without_a_common_direction_are_refused(tmp_path: Path) -> None:
    states_Nd = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.1, -1.0]])
    with pytest.raises(ValueError, match=r"share no direction.*draft_vocab_size=null"):
        outside_row(states_Nd, torch.zeros(4, 1), outside=5)


def test_mass_outside_is_refused(leaning: Target, tmp_path: Path) -> None:
    drafter = causal_lm(leaning, head=OWN, size=60)
    exporter = AssistantExporter()
    exporter.write(drafter, tmp_path, texts=texts(leaning, 8, 60))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert drafter.draft_ids_D is not None
    outside = torch.ones(leaning.vocab_size, dtype=torch.bool).index_fill(0, drafter.draft_ids_D, 0)
    tensors["lm_head.weight"][outside] *= 0.05
    save_file(tensors, str(file), metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"outside the draft vocabulary.*draft_vocab_size=null"):
        exporter.compare(tmp_path, drafter=drafter, target=leaning, texts=texts(leaning))


def test_half_precision_is_written_and_compared_as_written(leaning: Target, tmp_path: Path) -> None:
    exporter = AssistantExporter(dtype="bfloat16")
    drafter = exporter.cast(causal_lm(leaning, head=FROZEN, size=60))
    exporter.write(drafter, tmp_path, texts=texts(leaning, 8, 60))
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def run_export(*overrides: str) -> Path:
    assert schema  # registers the commands' root keys
    with initialize_config_module("conf", version_base=None):
        return export(compose("export", overrides=list(overrides)))


@pytest.mark.engine
def test_the_command_measures_and_records(
    leaning: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaning.model.save_pretrained(tmp_path / "target")  # type: ignore[operator]
    leaning.tokenizer.save_pretrained(tmp_path / "target")
    drafter = causal_lm(leaning, head=FROZEN, size=200)
    node = {"_target_": "models.drafter.causal_lm.CausalLm", "num_layers": 4, "head": FROZEN}
    run = tmp_path / "tiny"
    target_dir = tmp_path / "target"
    write_run(run, drafter=drafter, node=node, target=leaning, target_dir=target_dir, prompt=8)
    common = (f"run={run}", "texts=2", "prove=true", "prompts=3", "max_new_tokens=20")
    with pytest.raises(ValueError, match="no engine that runs here loads what exporter=hf"):
        run_export(*common, "exporter=hf")
    out = run_export(*common, "exporter=assistant", "exporter.gamma=3")
    assert out == run / "export" / "assistant"
    assert check_export(out) == "assistant"
    record = json.loads((out / "parity.json").read_text())
    served_there = record["served"]
    assert served_there["bench"] == "heldout"
    assert [served_there[k] for k in ("prompts", "own_texts", "same_texts")] == [3, 3, 3]
    assert served_there["engine_tau"] == served_there["reference_tau"] > 1.0
    assert served_there["difference"] == 0.0
    assert record["figures"]["largest_outside_mass"] < 1e-6
    card = (out / "README.md").read_text()
    assert "small language model" in card
    assert "no text by itself" not in card
    sentence = f"{served_there['engine_tau']:.4f} tokens per step (bonus included)"
    printed = " ".join(capsys.readouterr().err.split())
    for text in (card, printed):
        assert sentence in text
        assert f"reference decoder {served_there['reference_tau']:.4f} along the same text" in text
    assert "library_name: transformers" in card
    assert '"num_speculative_tokens": 3' in card


def test_what_it_cannot_serve_is_refused(target: Target, tmp_path: Path) -> None:
    medusa = Medusa(
        hidden_size=target.hidden_size, vocab_size=target.vocab_size, num_heads=2, head=OWN
    )
    exporter = AssistantExporter()
    with pytest.raises(ValueError, match=r"Medusa reads the target's states.*drafter=causal_lm"):
        exporter.refuse(medusa)
    with pytest.raises(ValueError, match="has a bias"):
        exporter.refuse(causal_lm(target, head={**OWN, "bias": True}))
    with pytest.raises(ValueError, match="gamma=0"):
        AssistantExporter(gamma=0)


def test_the_validator_names_each_fault(leaning: Target, tmp_path: Path) -> None:
    AssistantExporter().write(causal_lm(leaning, head=OWN), tmp_path)
    file, knobs = tmp_path / "model.safetensors", tmp_path / "generation_config.json"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file({**tensors, "token_map": torch.arange(9)}, str(file), metadata={"format": "pt"})
    written = json.loads(knobs.read_text())
    del written["assistant_confidence_threshold"]
    knobs.write_text(json.dumps(written))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="would not serve") as error:
        check_export(tmp_path)
    for fault in ("'model.norm.weight' is missing", "'token_map'", "tokenizer.json is missing"):
        assert fault in str(error.value)
    assert "confidence threshold" in str(error.value)
