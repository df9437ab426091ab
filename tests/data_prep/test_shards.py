import json
import pickle

import pytest
import torch

from data_prep.folder import DatasetFolder
from data_prep.manifest import dataset_hash, read_manifest, require_same_target
from data_prep.shards import Example, ShardReader, write_tokens
from data_prep.stage.capture import Capture
from tests.data_prep.common import dataset
from tests.tiny import tiny_target


@pytest.fixture
def folder(target, tmp_path) -> DatasetFolder:
    return dataset(tmp_path, capture=Capture(layers=[1])).prepare(target)


def test_round_trip_over_several_shards(tmp_path):
    examples = [
        Example(
            id=f"x/{i}",
            tokens=torch.arange(i + 2),
            learn=torch.arange(i + 2) >= 1,
            category="c" if i % 2 else None,
            finish_reason="eos",
            temperature=0.5,
            top_p=1.0,
            seed=2**31 - 1 - i,
        )
        for i in range(7)
    ]
    entries = write_tokens(tmp_path / "train", examples, per_shard=3)
    assert [e["rows"] for e in entries] == [3, 3, 1]
    manifest = {"splits": {"train": {"tokens": entries, "features": []}}}
    reader = ShardReader(tmp_path, "train", manifest)
    assert reader.lengths == [2, 3, 4, 5, 6, 7, 8]
    for i, example in enumerate(examples):
        back = reader[i]
        assert torch.equal(back.tokens, example.tokens)
        assert torch.equal(back.learn, example.learn)
        assert back.tokens.dtype == torch.long
        assert back.learn.dtype == torch.bool
        for name in ("id", "category", "finish_reason", "temperature", "top_p", "seed"):
            assert getattr(back, name) == getattr(example, name)
    with pytest.raises(IndexError):
        reader[7]


def test_another_target_template_or_layer_set_is_refused(target, folder):
    folder.check(target, layers=(1,))
    folder.check(target, layers=())
    with pytest.raises(ValueError, match=r"another target: fingerprint .*'tiny-0'.*'tiny-1'"):
        folder.check(tiny_target(1))
    other = tiny_target()
    other.tokenizer.chat_template = f"{other.tokenizer.chat_template} "
    with pytest.raises(ValueError, match="another chat template: template_hash"):
        folder.check(other)
    with pytest.raises(ValueError, match=r"hold the layers \[1\], but layers \[2\] are also"):
        folder.check(target, layers=(1, 2))
    with pytest.raises(ValueError, match=r"hold the layers \[1\], but layers \[3\]"):
        folder.reader("val").features(0, (3,))


def test_without_feature_shards_no_layer_is_missing(target, tmp_path):
    bare = dataset(tmp_path).prepare(target)
    require_same_target(bare.manifest, target, where="x", layers=(1, 2))
    assert bare.reader("val").layers is None


def test_damaged_shards_are_refused(folder):
    shard = next(folder.path.glob("train/features-*.safetensors"))
    content = shard.read_bytes()
    folder.verify()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"sha256 .* the manifest says"):
        folder.verify()
    with pytest.raises(ValueError, match="sha256"):
        folder.reader("train").features(0)
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"bytes, the manifest says"):
        folder.verify()
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        folder.verify()


def test_a_damaged_token_shard_is_refused_on_opening(folder):
    shard = folder.path / "val/tokens-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="sha256"):
        folder.reader("val")
    folder.reader("train")


def test_a_reader_travels_to_another_process(folder):
    reader = folder.reader("train")
    want = reader.features(1, (1,))
    assert want is not None
    got = pickle.loads(pickle.dumps(reader)).features(1, (1,))
    assert torch.equal(got[0].final_BTd, want[0].final_BTd)
    assert torch.equal(got[0].layers[1], want[0].layers[1])


def test_the_hash_follows_the_shards(folder):
    assert folder.hash == dataset_hash(read_manifest(folder.path))
    changed = json.loads(json.dumps(folder.manifest))
    changed["name"] = "other"
    assert dataset_hash(changed) == folder.hash
    changed["splits"]["val"]["tokens"][0]["sha256"] = "0"
    assert dataset_hash(changed) != folder.hash


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished dataset"):
        DatasetFolder(tmp_path)
