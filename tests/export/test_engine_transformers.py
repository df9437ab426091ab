"""transformers' assisted generation, as the model card's own lines call it."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM

from data_prep.prompts import Prompt
from export.assistant import AssistantExporter
from export.engine.transformers import Transformers
from export.gate import follow
from models.target import Target
from tests import needs
from tests.export import serve
from tests.export.quick_gate import quick

pytestmark = [*needs.engine(Transformers()), needs.packaged_target]
GAMMA = 3


def test_the_lines_of_the_card_generate(
    small_target: Target,
    texts: list[Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Executed as they stand there. transformers does not say what it accepted: forwards of the
    target are counted."""
    drafter = quick("causal_lm", small_target, texts)
    folder = tmp_path / "target"  # in fp32, where nothing is left to rounding
    small_target.model.save_pretrained(folder)  # type: ignore[operator]
    small_target.tokenizer.save_pretrained(folder)
    exporter = AssistantExporter(gamma=GAMMA)
    lines = serve.command(exporter, drafter, tmp_path / "draft", target=folder)
    forwards = []
    plain = LlamaForCausalLM.forward

    def counted(self: LlamaForCausalLM, *given: Any, **named: Any) -> Any:
        if self.config.num_hidden_layers == small_target.num_layers:
            forwards.append(1)
        return plain(self, *given, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    space: dict[str, Any] = {}
    exec(lines, space)
    monkeypatch.undo()
    written = space["out"][0].tolist()
    prompt = small_target.tokenizer("The capital of France is")["input_ids"]
    answer = serve.alone(small_target, prompt, 64, ends=True)
    assert written == prompt + answer
    assert str(small_target.tokenizer.decode(written)) in capsys.readouterr().out
    # It drafts before it has read the prompt: its first round starts from the prompt's last token.
    before = Prompt("card", prompt[:-1], "")
    rounds = follow(drafter, small_target, before, [prompt[-1], *answer], gamma=GAMMA).rounds
    assert len(forwards) == len(rounds) < 0.8 * len(answer)
