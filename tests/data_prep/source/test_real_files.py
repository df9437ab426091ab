"""Every data file beside the repository is readable, with the number of records it has."""

import re
from pathlib import Path

import pytest

from data_prep.source.files import Files

DATA = Path(__file__).parents[4] / "shared" / "data"
# Records per file where the name does not end in the number.
COUNTS = {
    "HumanEval": 164,
    "gsm8k_test": 1319,
    "gsm8k_train": 7473,
    "gpteacher_codegen": 4535,
    "gpteacher_roleplay": 1923,
    "mbpp": 974,
    "taskmaster4_07": 210,
}
# Record 483 begins with a speech nobody is named for.
BAD = {"persona_chat_1000": 1}
FILES = sorted(p for folder in ("prompts", "eval", "text") for p in DATA.glob(f"{folder}/*.gz"))


@pytest.mark.skipif(not FILES, reason="no ../shared/data beside the repository")
def test_every_real_file_is_read():
    for path in FILES:
        name = path.name.split(".")[0]
        source = Files(path=str(path), on_bad="skip")
        found = list(source.read())
        if name == "mt_bench_reference_30":
            assert len(source.skipped) == 30
            assert "without the prompts" in source.skipped[0]
            continue
        assert len(source.skipped) == BAD.get(name, 0), name
        is_text = path.parent.name == "text" or name == "lambada_5153"
        assert all(c.is_text == is_text for c in found), name
        if path.suffixes[0] == ".txt":
            continue
        number = re.search(r"_(\d+)$", name)
        expected = COUNTS.get(name) or int(number.group(1) if number else 0)
        assert len(found) + len(source.skipped) == expected, name
        if not is_text:
            assert all(c.prompt()[-1]["role"] == "user" for c in found), name
