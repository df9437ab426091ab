"""Every exported format: what is written, how it reads back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.check import check_export
from export.formats.medusa import MedusaCheckpoint
from export.hf import DrafterReader, HfExporter
from export.parity import prove_equal
from export.vllm import VllmExporter
from models.drafter.base import Drafter
from models.drafter.hydra_heads import HydraHeads
from models.drafter.medusa import Medusa
from models.target import Target

OWN = {"_target_": "models.head.own.OwnHead"}
FROZEN = {"_target_": "models.head.frozen.FrozenHead"}


def medusa(target: Target, *, head: dict[str, Any], size: int | None = None) -> Drafter:
    """Two heads of two blocks with random weights, so that no two rows or blocks are alike."""
    torch.manual_seed(0)
    drafter = Medusa(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_heads=2,
        num_layers=2,
        draft_vocab_size=size,
        head=head,
    )
    with torch.no_grad():
        for p in drafter.parameters():
            p.normal_(std=0.3)
    if size is not None:
        drafter.set_vocab(torch.randperm(target.vocab_size)[:size].sort().values)
    return drafter.bind(target).eval()


def hydra_heads(target: Target) -> Drafter:
    torch.manual_seed(0)
    drafter = HydraHeads(
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        target_shape=target.layer_shape,
        num_heads=2,
        prefix_layer=True,
        draft_vocab_size=50,
        head=OWN,
    )
    return drafter.bind(target).eval()


def texts(target: Target) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, target.vocab_size, (n,), generator=generator) for n in (12, 30)]


def proven(exporter: Any, drafter: Drafter, target: Target, folder: Path) -> int:
    exporter.write(drafter, folder)
    check_export(folder)
    proof = prove_equal(
        trained=DrafterReader(drafter),
        exported=exporter.read(folder, target),
        drafter=drafter,
        target=target,
        texts=texts(target),
    )
    return proof.tokens


@pytest.mark.parametrize("head", [OWN, FROZEN], ids=["own", "frozen"])
@pytest.mark.parametrize("size", [None, 40])
def test_vllm_drafts_the_same_tokens(
    target: Target, tmp_path: Path, head: dict[str, Any], size: int | None
) -> None:
    drafter = medusa(target, head=head, size=size)
    # 11 ends in the first text, 16 of the second; two heads each.
    assert proven(VllmExporter(), drafter, target, tmp_path) == 2 * (11 + 16)


def test_vllm_layout(target: Target, tmp_path: Path) -> None:
    d, vocab = target.hidden_size, target.vocab_size
    VllmExporter().write(medusa(target, head=OWN), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": d,
        "vocab_size": vocab,
        "num_heads": 2,
        "num_hidden_layers": 2,
        "medusa_fc_bias": True,
        "torch_dtype": "float32",
    }
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "model.safetensors").items()}
    blocks = {f"blocks.{i}.layers.{j}" for i in range(2) for j in range(2)}
    assert shapes == {
        **{f"{b}.weight": (d, d) for b in blocks},
        **{f"{b}.bias": (d,) for b in blocks},
        "lm_heads.0.weight": (vocab, d),
        "lm_heads.1.weight": (vocab, d),
    }


def test_a_frozen_head_is_written_once(target: Target, tmp_path: Path) -> None:
    drafter = medusa(target, head=FROZEN, size=40)
    VllmExporter().write(drafter, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["original_lm_head"] is True
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_heads.1.weight" not in tensors
    ids_D, head_Vd = drafter.draft_ids_D, target.head_weight_Vd
    assert ids_D is not None
    assert torch.equal(tensors["lm_heads.0.weight"][ids_D], head_Vd[ids_D])
    outside = sorted(set(range(target.vocab_size)) - set(ids_D.tolist()))
    mean_d = head_Vd[ids_D].mean(0)
    assert torch.equal(tensors["lm_heads.0.weight"][outside], mean_d.expand(len(outside), -1))


def test_rows_outside_the_draft_vocabulary_never_win(target: Target, tmp_path: Path) -> None:
    drafter = medusa(target, head=OWN, size=40)
    VllmExporter().write(drafter, tmp_path)
    wide_Vd = load_file(tmp_path / "model.safetensors")["lm_heads.1.weight"]
    assert drafter.draft_ids_D is not None
    states = torch.randn(500, target.hidden_size, generator=torch.Generator().manual_seed(1)) * 9
    assert set((states @ wide_Vd.T).argmax(-1).tolist()) <= set(drafter.draft_ids_D.tolist())


def test_the_reader_agrees_with_a_hand_worked_checkpoint(tmp_path: Path) -> None:
    # d=2, V=3, one head of one block: y = f + SiLU(A f + a), logits = U y.
    tensors = {
        "blocks.0.layers.0.weight": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        "blocks.0.layers.0.bias": torch.tensor([0.0, 10.0]),
        "lm_heads.0.weight": torch.tensor([[1.0, 0.0], [0.0, 0.2], [-1.0, 0.0]]),
    }
    config = {"num_heads": 1, "num_hidden_layers": 1, "medusa_fc_bias": True}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    from models.target import Features

    # f = (1, 2): A f + a = (2, 10), SiLU = (1.76, 10.0), y = (2.76, 12.0), logits (2.76, 2.40, ..)
    features = Features(torch.tensor([[[1.0, 2.0]]]))
    tokens = torch.zeros(1, 2, dtype=torch.long)
    assert MedusaCheckpoint(tmp_path, torch.device("cpu")).draft(features, tokens) == [0]
    # Without the bias SiLU is (1.76, 0) and y = (2.76, 2): still 0. Scaling row 1 shows the bias.
    tensors["lm_heads.0.weight"][1, 1] = 0.3  # 3.6 with the bias, 0.6 without
    save_file(tensors, str(tmp_path / "model.safetensors"))
    assert MedusaCheckpoint(tmp_path, torch.device("cpu")).draft(features, tokens) == [1]


@pytest.mark.parametrize("family", ["medusa", "hydra_heads"])
def test_hf_round_trip(target: Target, tmp_path: Path, family: str) -> None:
    drafter = hydra_heads(target) if family == "hydra_heads" else medusa(target, head=OWN, size=40)
    assert proven(HfExporter(), drafter, target, tmp_path) == 2 * (11 + 16)


def test_half_precision_is_written_and_compared_as_written(target: Target, tmp_path: Path) -> None:
    exporter = VllmExporter(dtype="bfloat16")
    drafter = exporter.cast(medusa(target, head=OWN))
    exporter.write(drafter, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    proof = prove_equal(
        trained=DrafterReader(drafter.float()),
        exported=exporter.read(tmp_path, target),
        drafter=drafter,
        target=target,
        texts=texts(target),
    )
    assert proof.chains == 27


def test_vllm_refuses_what_it_cannot_serve(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vLLM cannot serve HydraHeads: it has EAGLE-3"):
        VllmExporter().write(hydra_heads(target), tmp_path)
    with pytest.raises(ValueError, match="head has a bias"):
        VllmExporter().write(medusa(target, head={**OWN, "bias": True}), tmp_path)


def test_a_wrong_export_is_not_proven(target: Target, tmp_path: Path) -> None:
    drafter = medusa(target, head=OWN)
    VllmExporter().write(drafter, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for i in range(2):  # biases lost, as an engine would without medusa_fc_bias
        tensors[f"blocks.{i}.layers.0.bias"].zero_()
    save_file(tensors, str(file))
    with pytest.raises(ValueError, match="nothing was exported"):
        prove_equal(
            trained=DrafterReader(drafter),
            exported=VllmExporter().read(tmp_path, target),
            drafter=drafter,
            target=target,
            texts=texts(target),
        )


def edit(folder: Path, **changes: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, Any] = {**load_file(file), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, str(file))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lm_heads.1.weight": None}, "'lm_heads.1.weight' is missing"),
        ({"token_map": torch.arange(9)}, "'token_map' .* no part"),
        ({"embed_tokens.weight": torch.ones(3, 2)}, "'embed_tokens.weight' .* no part"),
        ({"lm_heads.0.weight": torch.ones(3, 2)}, r"shape \[3, 2\], expected"),
        ({"blocks.0.layers.0.bias": torch.ones(32).half()}, "several precisions"),
    ],
)
def test_the_validator_names_each_fault(
    target: Target, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    VllmExporter().write(medusa(target, head=OWN), tmp_path)
    assert check_export(tmp_path) == "medusa"
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=complaint):
        check_export(tmp_path)


def test_the_validator_checks_the_vocabulary_map(target: Target, tmp_path: Path) -> None:
    HfExporter().write(medusa(target, head=OWN, size=40), tmp_path)
    assert check_export(tmp_path) == "hf"
    ids = load_file(tmp_path / "model.safetensors")["draft_ids_D"]
    edit(tmp_path, draft_ids_D=ids.flip(0).contiguous())
    with pytest.raises(ValueError, match="not strictly ascending"):
        check_export(tmp_path)
    edit(tmp_path, draft_ids_D=ids + target.vocab_size)
    with pytest.raises(ValueError, match="outside of the target's"):
        check_export(tmp_path)


def test_the_hf_validator_finds_stray_weights_of_the_target(target: Target, tmp_path: Path) -> None:
    HfExporter().write(hydra_heads(target), tmp_path)
    assert check_export(tmp_path) == "hf"
    edit(tmp_path, **{"embed_tokens.weight": target.embedding_weight_Vd.clone()})
    with pytest.raises(ValueError, match=r"'embed_tokens.weight' .* belongs to no part"):
        check_export(tmp_path)


def test_the_validator_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        check_export(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="in no format we know"):
        check_export(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="not valid JSON"):
        check_export(tmp_path)
