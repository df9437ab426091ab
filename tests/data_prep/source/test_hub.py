import json

import pytest

from data_prep.source.hub import Hub


def test_a_folder_is_loaded_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "chats"
    folder.mkdir()
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = list(Hub(dataset=str(folder), limit=3).read())
    assert len(found) == 3
    assert all(c.id.startswith("chats/") for c in found)


def test_records_without_a_shape(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"foo": 1}\n')
    with pytest.raises(ValueError, match=r"record 0 of the Hub dataset .* fits no known shape"):
        list(Hub(dataset=str(folder)).read())
    source = Hub(dataset=str(folder), on_bad="skip")
    assert list(source.read()) == []
    assert len(source.skipped) == 1


def test_an_unknown_dataset_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        list(Hub(dataset=str(tmp_path / "nothing")).read())
