"""A second dataset in the training split."""

from pathlib import Path

import pytest
import torch

from data_prep.manifest import write_json
from data_prep.shards import Example, ShardReader, write_tokens
from train.mix import Mix, MixedReader


class Prepared:
    """Stands in for a dataset that is finished: its reader only."""

    name = "extra"

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    def reader(self, split: str) -> ShardReader:
        return self._reader


def stored(folder: Path, name: str, count: int, length: int) -> ShardReader:
    """`count` examples of `length` tokens, all but the first to be learned."""
    examples = [
        Example(
            id=f"{name}/{i}",
            tokens=torch.arange(length) + i,
            learn=torch.arange(length) > 0,
        )
        for i in range(count)
    ]
    learned = sum(int(e.learn.sum()) for e in examples)
    entries = write_tokens(folder / name / "train", examples, 100)
    part = {"tokens": entries, "features": [], "learned": learned}
    manifest = {"splits": {"train": part, "val": part}, "features": None}
    write_json(folder / name / "manifest.json", manifest)
    return ShardReader(folder / name, "train")


def mixed(tmp_path: Path, share: float) -> MixedReader:
    main, extra = stored(tmp_path, "main", 20, 10), stored(tmp_path, "extra", 30, 5)
    mix = Mix(dataset=None, share=share)  # type: ignore[arg-type]
    mix.dataset = mix.folder = Prepared(extra)  # type: ignore[assignment]
    return mix.reader(main)


def test_the_share_is_of_the_tokens_to_learn(tmp_path: Path) -> None:
    """180 tokens in `main`; a tenth of the whole is 20 more: five examples of four."""
    reader = mixed(tmp_path, 0.1)
    assert len(reader) == 25
    assert [reader[i].id for i in range(20)] == [f"main/{i}" for i in range(20)]
    extra = [reader[i] for i in range(20, 25)]
    assert len({e.id for e in extra}) == 5
    assert all(e.id.startswith("extra/") for e in extra)
    assert sum(int(e.learn.sum()) for e in extra) == 20


def test_all_is_used_and_said_when_there_is_too_little(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the whole would be 180 tokens; there are 120."""
    assert len(mixed(tmp_path, 0.5)) == 50
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "120 tokens to learn of dataset 'extra', all it has" in printed


def test_features_only_where_both_have_them(tmp_path: Path) -> None:
    reader = mixed(tmp_path, 0.1)
    assert reader.layers is None
    assert reader.features(22, ()) is None


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_of_nothing_or_all_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"mix\.share="):
        Mix(dataset=None, share=share)  # type: ignore[arg-type]
