"""What surrounds llama.cpp: its timings as rounds, by hand, and the target as a GGUF of its own."""

from pathlib import Path

import pytest
import torch

from export.base import commands
from export.engine.drivers.llamacpp_driver import rounds_of
from export.engine.llamacpp import draft_type, target_gguf
from export.formats.gguf import FILE
from export.formats.gguf_reader import GgufModel, Seen
from export.gguf import GgufExporter
from models.target import Target
from tests.export.formats.drafters import eagle3


def timings(*rows: tuple[float, int, int]) -> list[dict[str, float]]:
    """(time, drafts so far, accepted so far) of each message."""
    return [{"predicted_ms": t, "draft_n": n, "draft_n_accepted": a} for t, n, a in rows]


def test_rounds_of_timings_by_hand() -> None:
    # The first token; a round that kept 2 of 3 drafts (three messages); one that kept none; the
    # last drafts 1, keeps it.
    shown = timings((0, 0, 0), (5, 3, 2), (5, 3, 2), (5, 3, 2), (9, 6, 2), (12, 7, 3), (12, 7, 3))
    assert rounds_of(shown, 3, 6) == [3, 1, 2]
    # An end inside the last round, and one inside the first: what follows it is cut off.
    assert rounds_of(shown, 3, 5) == [3, 1, 1]
    assert rounds_of(shown, 3, 2) == [2]
    assert rounds_of(shown, 3, 0) == []
    # Without a drafter a round is a token.
    plain = [{"predicted_ms": t} for t in (0.0, 5.0, 9.0, 12.0)]
    assert rounds_of(plain, 3, 3) == [1, 1, 1]


def test_a_round_without_a_message_is_seen_in_the_next() -> None:
    # Its one token ends inside a character: six drafts between two messages are two rounds.
    shown = timings((0, 0, 0), (5, 3, 1), (5, 3, 1), (12, 9, 3), (12, 9, 3))
    assert rounds_of(shown, 3, 6) == [2, 1, 3]
    with pytest.raises(RuntimeError, match="show 6 of 9 tokens"):
        rounds_of(shown, 3, 9)


def test_the_target_as_gguf_is_the_target(
    target: Target, target_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    file = target_gguf(target_dir, "float32")
    assert file == target_gguf(target_dir, "float32")
    assert file != target_gguf(target_dir, "bfloat16")
    assert len(list(tmp_path.rglob("*.gguf"))) == 2
    tokens_T = torch.tensor([5, 77, 130, 9])
    with torch.inference_mode():
        got_TV = GgufModel(file, torch.device("cpu")).logits(tokens_T, 0, [Seen() for _ in "abcd"])
        want_TV = target.project(target.forward(tokens_T[None]).final_BTd)[0]
    torch.testing.assert_close(got_TV, want_TV, rtol=1e-4, atol=1e-4)


def test_the_serve_command_names_the_kind(target: Target, tmp_path: Path) -> None:
    exporter = GgufExporter(gamma=5)
    exporter.write(eagle3(target), tmp_path)
    assert draft_type(tmp_path / FILE) == "draft-eagle3"
    assert commands(exporter.usage(target="t", depths=5))[1] == (
        "bash",
        "llama-server -m path/to/target.gguf -md path/to/this/folder/drafter.gguf \\\n"
        "  --spec-type draft-eagle3 --spec-draft-n-max 5",
    )
