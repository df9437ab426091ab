from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.generate import Generator
from data_prep.manifest import read_manifest
from data_prep.signal import Sampled, TopK
from data_prep.stage import capture as module
from data_prep.stage.capture import Capture, batches_by_length, compute
from tests.data_prep.common import dataset
from tests.tiny import tiny_target

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
        ValueError, match=r"layers=\[5\] names \[5\], but 'tiny-0' has layers 0 .* 4"
    ):
        dataset(tmp_path, capture=Capture(layers=[5])).prepare(target)


def test_batches_hold_similar_lengths_within_the_budget():
    assert batches_by_length([5, 1, 9, 5, 2], 10) == [[2], [0, 3], [4, 1]]
    assert batches_by_length([50], 10) == [[0]]


# --- signals -------------------------------------------------------------------------------------


def signal_files(folder, name):
    return {p: p.stat().st_mtime_ns for p in sorted(folder.glob(f"*/{name}-*.safetensors"))}


def same_rows(one, two):
    assert torch.equal(one.ids_NK, two.ids_NK)
    assert torch.equal(one.counts_NK, two.counts_NK)


def test_a_signal_is_the_targets_own_p_where_it_teaches(target, tmp_path):
    """Rows in order of the positions u with learn[u+1], without any feature shard."""
    job = dataset(tmp_path, capture=Capture(features=False, signal=TopK(k=7)))
    folder = job.prepare(target)
    assert folder.manifest["features"] is None
    assert not list(folder.path.glob("*/features-*"))
    reader = folder.reader("train")
    assert (reader.layers, reader.signals) == (None, ("topk7",))
    for i in range(len(reader)):
        example = reader[i]
        rows = reader.signal(i, "topk7")
        logp = target.model(input_ids=example.tokens[None]).logits[0].log_softmax(-1)
        logp = logp[:-1][example.learn[1:]]
        assert rows.ids_NK.tolist() == logp.topk(7).indices.tolist()
        torch.testing.assert_close(rows.logp_NK, logp.topk(7).values, rtol=2**-10, atol=1e-5)
        tail = 1 - logp.topk(7).values.exp().sum(-1)
        assert rows.tail_N is not None
        torch.testing.assert_close(rows.tail_N.exp(), tail, rtol=2e-2, atol=1e-5)


def test_signals_lie_side_by_side_and_nothing_is_answered_twice(target, tmp_path, monkeypatch):
    """Features first, then one signal and another: each adds its shards and leaves the others."""
    first = dataset(tmp_path, capture=Capture(dtype="float32")).prepare(target)
    monkeypatch.setattr(Generator, "answer_batch", None)
    hashes = [first.hash]
    before = signal_files(first.path, "features")
    for signal in (TopK(k=4), Sampled(draws=9)):
        for features in (True, False):  # features are there already
            job = dataset(tmp_path, capture=Capture(features=features, signal=signal))
            hashes.append(job.prepare(target).hash)
        before |= signal_files(first.path, signal.name)
    assert len(set(hashes)) == 3
    last = dataset(tmp_path).prepare(target)
    last.verify()
    assert last.hash == hashes[-1]
    assert last.reader("val").signals == ("topk4", "sampled9")
    assert last.reader("val").features(0) is not None
    for name in ("features", "topk4", "sampled9"):
        assert {p: t for p, t in before.items() if p.name.startswith(name)} == signal_files(
            last.path, name
        )
    damaged = next(last.path.glob("val/topk4-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the manifest says"):
        last.reader("val").signal(0, "topk4")


def test_features_and_a_signal_in_one_pass_of_the_target(target, tmp_path, monkeypatch):
    """The same shards as one after the other, for half the forwards."""
    passes = []
    forward = type(target).forward

    def counted(self, *args, **settings):
        passes.append(1)
        return forward(self, *args, **settings)

    monkeypatch.setattr(type(target), "forward", counted)
    apart = dataset(tmp_path, name="apart").prepare(target)
    passes.clear()
    settings: dict[str, Any] = {"dtype": "float32", "batch_tokens": 128}
    dataset(tmp_path, name="apart", capture=Capture(**settings)).prepare(target)
    alone = len(passes)
    signal = Sampled(draws=9)
    dataset(
        tmp_path, name="apart", capture=Capture(features=False, signal=signal, **settings)
    ).prepare(target)
    dataset(tmp_path, name="one").prepare(target)
    passes.clear()
    one = dataset(tmp_path, name="one", capture=Capture(signal=signal, **settings)).prepare(target)
    # The estimate before looks at a few examples by themselves.
    assert len(passes) <= alone + 14
    for split in ("train", "val"):
        readers = [apart.reader(split), one.reader(split)]
        readers[0] = dataset(tmp_path, name="apart").prepare(target).reader(split)
        for i in range(len(readers[0])):
            one_of, other = (r.features(i) for r in readers)
            assert one_of is not None
            assert other is not None
            assert torch.equal(one_of[0].final_BTd, other[0].final_BTd)
            same_rows(*(r.signal(i, "sampled9") for r in readers))


def test_a_signal_takes_its_states_from_feature_shards(target, tmp_path, monkeypatch):
    """Stored in the target's dtype they are what the target would compute; rounded, they are not
    used."""
    signal = TopK(k=7)
    features: dict[str, Any] = {"whole": "float32", "rounded": "bfloat16"}
    for name, dtype in features.items():
        dataset(tmp_path, name=name, capture=Capture(dtype=dtype)).prepare(target)
    passes = []
    monkeypatch.setattr(
        "data_prep.stage.capture.compute", lambda *a: passes.append(1) or compute(*a)
    )
    monkeypatch.setattr("data_prep.pipeline.Dataset._announce", lambda *a: None)
    made = {}
    for name in features:
        passes.clear()
        job = dataset(tmp_path, name=name, capture=Capture(features=False, signal=signal))
        made[name] = job.prepare(target).reader("train")
        assert bool(passes) == (name == "rounded")
    for i in range(len(made["whole"])):
        one, other = (made[name].signal(i, "topk7") for name in features)
        assert torch.equal(one.ids_NK[:, 0], other.ids_NK[:, 0])
        torch.testing.assert_close(one.logp_NK, other.logp_NK, rtol=2**-10, atol=1e-4)


def test_an_interrupted_signal_goes_on_with_the_same_draws(target, tmp_path, monkeypatch):
    """Killed in the middle: finished shards stay, and the whole is that of a run in one piece."""
    settings: dict[str, Any] = {"features": False, "signal": Sampled(draws=11)}
    settings["batch_tokens"] = 128
    settings["shard_bytes"] = 2**14
    whole = dataset(tmp_path, name="whole", capture=Capture(**settings)).prepare(target)
    compute, calls = module.compute, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(module, "compute", dies)
    broken = dataset(tmp_path, name="broken", capture=Capture(**settings))
    with pytest.raises(KeyboardInterrupt):
        broken.prepare(target)
    done = signal_files(tmp_path / "out/broken", "sampled11")
    assert done
    monkeypatch.setattr(module, "compute", compute)
    continued = dataset(tmp_path, name="broken", capture=Capture(**settings)).prepare(target)
    after = signal_files(continued.path, "sampled11")
    assert {p: after[p] for p in done} == done
    assert len(after) > len(done)
    assert [e["sha256"] for e in whole.manifest["splits"]["train"]["signals"]["sampled11"]] == [
        e["sha256"] for e in continued.manifest["splits"]["train"]["signals"]["sampled11"]
    ]


def test_draws_do_not_depend_on_the_batch(target, tmp_path):
    jobs = [
        dataset(
            tmp_path,
            name=str(size),
            capture=Capture(features=False, signal=Sampled(draws=5), batch_tokens=size),
        ).prepare(target)
        for size in (64, 4096)
    ]
    readers = [job.reader("train") for job in jobs]
    for i in range(len(readers[0])):
        same_rows(*(r.signal(i, "sampled5") for r in readers))
    first, second = (readers[0].signal(i, "sampled5") for i in (0, 1))
    assert first.ids_NK.tolist() != second.ids_NK.tolist()


def test_nothing_to_capture_is_refused():
    with pytest.raises(ValueError, match="nothing to capture"):
        Capture(features=False)
    with pytest.raises(ValueError, match="inner layers are features"):
        Capture(features=False, layers=[1], signal=TopK(k=2))
    wide = Capture(signal=TopK(k=255))
    with pytest.raises(ValueError, match=r"TopK\(k=255\) should be less than .* of 255"):
        wide.check(tiny_target(vocab_size=255))
