"""The speculators library as an independent reader: its logits, and the losses and gradients of a
training step, are ours (`python -m export install=speculators` first)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import export.engine
from export.engine.process import call_driver
from export.engine.speculators import Speculators
from export.speculators import SpeculatorsExporter
from models.target import Target
from tests import needs
from tests.export.formats.drafters import eagle3, texts
from train.chunked import chunked_loss, make_lesson
from train.losses import ForwardKL
from train.teacher import Teacher

LIBRARY = Speculators()
DRIVER = Path(export.engine.__file__).parent / "drivers" / "speculators_driver.py"

pytestmark = needs.engine(LIBRARY)


@pytest.mark.parametrize(
    "settings",
    [{"norm_before_residual": True, "norm_output": True}, {"draft_vocab_size": None}],
    ids=["normed-residual", "whole"],
)
def test_logits_are_ours(
    target: Target, target_dir: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    drafter = eagle3(target, **settings)
    folder = tmp_path / "export"
    folder.mkdir()
    SpeculatorsExporter(verifier=str(target_dir)).write(drafter, folder)
    tokens_T = texts(target)[1]
    features = target.forward(tokens_T[None], layers=drafter.feature_layers)
    joined = torch.cat([features.layers[k][0, :-1] for k in (1, 2, 3)], dim=-1)
    seen, logits = tmp_path / "seen.safetensors", tmp_path / "logits.safetensors"
    save_file({"features_Te": joined.contiguous(), "tokens_T": tokens_T[1:].contiguous()}, seen)
    answer = call_driver(
        LIBRARY.python,
        DRIVER,
        {"draft": str(folder), "seen": str(seen), "logits": str(logits)},
        environment={"HF_HUB_OFFLINE": "1"},
        timeout_s=300.0,
    )
    assert answer["versions"]["speculators"] == LIBRARY.version
    with torch.inference_mode():
        depth = next(iter(drafter.unroll(features, tokens_T[None])))
        want_TD = depth.head(depth.states_BNd[0, :-1])
    got_TD = load_file(logits)["logits_TD"]
    torch.testing.assert_close(got_TD, want_TD, rtol=1e-4, atol=1e-4)


def test_a_training_step_has_the_same_losses_and_gradients(
    target: Target, target_dir: Path, tmp_path: Path
) -> None:
    """Three unrolled steps over the whole vocabulary, in fp32. Row i of the library reads features
    i and token i+1, and step k is taught by the target's row at i+1+k, which predicts x_{i+2+k}:
    ours counts that token."""
    steps = 3
    drafter = eagle3(target, draft_vocab_size=None, steps=steps).train()
    folder = tmp_path / "export"
    folder.mkdir()
    SpeculatorsExporter(verifier=str(target_dir)).write(drafter, folder)
    tokens_T = texts(target)[1]
    T = len(tokens_T)
    learn_T = torch.arange(T) % 12 > 6  # answers behind prompts: ours then computes some rows
    learn_T[: steps + 1] = False  # each step then counts the same tokens
    features = target.forward(tokens_T[None], layers=drafter.feature_layers)
    lesson = make_lesson(
        tokens_BT=tokens_T[None],
        learn_BT=learn_T[None],
        final_BTd=features.final_BTd,
        logz_BT=target.project(features.final_BTd).logsumexp(-1),
        draft_ids_D=None,
        vocab_size=target.vocab_size,
    )
    teacher = Teacher(target=target)
    teacher.set_vocab(None)
    sums = chunked_loss(
        depths=list(drafter.unroll_taught(features, tokens_T[None], steps, lesson.taught_BT)),
        lesson=lesson,
        loss=ForwardKL(),
        projection=teacher,
        depth_decay=1.0,
        chunk_rows=8,
    )
    counted = int(learn_T.sum())
    assert sums.count_K.tolist() == [counted] * steps
    (sums.total / counted).backward()

    joined = torch.cat([features.layers[k][0, :-1] for k in (1, 2, 3)], dim=-1)
    given = {
        "features_Te": joined.contiguous(),
        "tokens_T": tokens_T[1:].contiguous(),
        "final_Td": features.final_BTd[0, 1:].contiguous(),
        "counts_T": torch.cat([learn_T[2:], torch.zeros(1, dtype=torch.bool)]).to(torch.uint8),
    }
    seen, gradients = tmp_path / "seen.safetensors", tmp_path / "gradients.safetensors"
    save_file(given, seen)
    answer = call_driver(
        LIBRARY.python,
        Path(__file__).parent / "speculators_step.py",
        {"draft": str(folder), "seen": str(seen), "gradients": str(gradients), "steps": steps},
        environment={"HF_HUB_OFFLINE": "1"},
        timeout_s=300.0,
    )
    ours = (sums.loss_K / sums.count_K).tolist()
    assert answer["losses"] == pytest.approx(ours, rel=1e-4)
    theirs = load_file(gradients)
    inner = drafter.layer
    for name, weight in {
        "layers.0.self_attn.q_proj.weight": inner.self_attn.q_proj.weight,
        "layers.0.self_attn.v_proj.weight": inner.self_attn.v_proj.weight,
        "layers.0.mlp.down_proj.weight": inner.mlp.down_proj.weight,
        "layers.0.hidden_norm.weight": drafter.hidden_norm.weight,
        "norm.weight": drafter.norm.weight,
        "lm_head.weight": drafter.head(0).linear.weight,  # type: ignore[union-attr]
    }.items():
        assert weight.grad is not None
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(theirs[name], weight.grad, rtol=1e-3, atol=1e-4 * scale)
