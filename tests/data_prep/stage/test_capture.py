import pytest
import torch
from safetensors.torch import load_file

from data_prep.manifest import read_manifest
from data_prep.stage import capture as module
from data_prep.stage.capture import Capture, batches_by_length
from tests.data_prep.common import dataset

SMALL = {"layers": [0, 2], "dtype": "float32", "batch_tokens": 128, "shard_bytes": 2**14}


@pytest.fixture
def folder(target, tmp_path):
    return dataset(tmp_path, capture=Capture(**SMALL)).prepare(target)


def test_features_equal_the_targets_own(target, folder):
    for split in ("train", "val"):
        reader = folder.reader(split)
        assert reader.layers == (0, 2)
        for i in range(len(reader)):
            tokens = reader[i].tokens[None]
            stored = reader.features(i, (2, 0))
            assert stored is not None
            got, logz_T = stored
            want = target.forward(tokens, layers=(0, 2))
            torch.testing.assert_close(got.final_BTd, want.final_BTd)
            torch.testing.assert_close(got.layers[0], want.layers[0])
            torch.testing.assert_close(got.layers[2], want.layers[2])
            logits = target.model(input_ids=tokens).logits[0]
            torch.testing.assert_close(logz_T, logits.logsumexp(-1))
            p = (target.project(got.final_BTd)[0] - logz_T[:, None]).exp()
            torch.testing.assert_close(p, logits.softmax(-1))


def test_several_shards_cover_all_rows(folder):
    entries = folder.manifest["splits"]["train"]["features"]
    assert len(entries) > 1
    assert [e["rows"][0] for e in entries[1:]] == [e["rows"][1] for e in entries[:-1]]
    assert entries[-1]["rows"][1] == len(folder.reader("train"))
    assert folder.manifest["features"] == {"layers": [0, 2], "dtype": "float32"}


def test_bf16_logz_belongs_to_the_stored_features(target, tmp_path):
    folder = dataset(tmp_path, capture=Capture()).prepare(target)
    stored = folder.reader("val").features(0)
    assert stored is not None
    features, logz_T = stored
    assert features.final_BTd.dtype == torch.bfloat16
    logits = target.project(features.final_BTd.float())[0]
    torch.testing.assert_close(
        (logits - logz_T[:, None]).exp().sum(-1), torch.ones(len(logz_T)), rtol=1e-5, atol=1e-5
    )


def test_an_interrupted_capture_repeats_no_finished_shard(target, tmp_path, monkeypatch):
    whole = dataset(tmp_path, name="whole", capture=Capture(**SMALL)).prepare(target)
    compute, calls = module.compute, []

    def dies_in_the_third(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(module, "compute", dies_in_the_third)
    monkeypatch.setattr("data_prep.stage.estimate.compute", compute)
    broken = dataset(tmp_path, name="broken", capture=Capture(**SMALL))
    with pytest.raises(KeyboardInterrupt):
        broken.prepare(target)
    done = sorted((tmp_path / "out/broken").glob("*/features-*.safetensors"))
    assert done
    before = {p: p.stat().st_mtime_ns for p in done}
    with pytest.raises(ValueError, match="no finished dataset"):
        read_manifest(tmp_path / "out/broken")
    # Half a file under a shard's name is made again.
    half = tmp_path / "out/broken/train/features-00009.safetensors"
    half.write_bytes(done[0].read_bytes()[:-100])
    monkeypatch.setattr(module, "compute", compute)
    continued = dataset(tmp_path, name="broken", capture=Capture(**SMALL)).prepare(target)
    assert {p: p.stat().st_mtime_ns for p in done} == before
    for split in ("train", "val"):
        for a, b in zip(
            whole.manifest["splits"][split]["features"],
            continued.manifest["splits"][split]["features"],
            strict=True,
        ):
            one, two = load_file(whole.path / a["file"]), load_file(continued.path / b["file"])
            assert one.keys() == two.keys()
            assert all(torch.equal(one[k], two[k]) for k in one)


def test_features_are_added_to_tokens_that_are_there(target, tmp_path):
    bare = dataset(tmp_path).prepare(target)
    assert bare.reader("train").features(0) is None
    full = dataset(tmp_path, capture=Capture(layers=[1])).prepare(target)
    assert full.manifest["splits"]["train"]["tokens"] == bare.manifest["splits"]["train"]["tokens"]
    assert full.reader("train").features(0, (1,)) is not None
    assert full.hash != bare.hash


def test_unknown_layers_are_refused(target, tmp_path):
    with pytest.raises(
        ValueError, match=r"layers=\[4\] names \[4\], but 'tiny-0' has layers 0 .* 3"
    ):
        dataset(tmp_path, capture=Capture(layers=[4])).prepare(target)


def test_batches_hold_similar_lengths_within_the_budget():
    assert batches_by_length([5, 1, 9, 5, 2], 10) == [[2], [0, 3], [4, 1]]
    assert batches_by_length([50], 10) == [[0]]
