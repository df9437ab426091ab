import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.source.files import Files

ROWS = [{"question": f"what is {i} plus two ?", "answer": f"it is {i + 2}"} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def encoded(suffix, tmp_path):
    if suffix == ".jsonl":
        return LINES.encode()
    if suffix == ".json":
        return json.dumps(ROWS, indent=1).encode()
    if suffix in (".csv", ".tsv"):
        mark = "," if suffix == ".csv" else "\t"
        body = "".join(f'"{r["question"]}"{mark}"{r["answer"]}"\r\n' for r in ROWS)
        return f"question{mark}answer\r\n{body}".encode()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    return (tmp_path / "t.parquet").read_bytes()


def read(path, **settings):
    source = Files(path=str(path), **settings)
    return source, list(source.read())


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_conversations(suffix, zipped, tmp_path):
    content = encoded(suffix, tmp_path)
    path = tmp_path / f"data{suffix}{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(content) if zipped else content)
    source, found = read(path)
    assert [c.id for c in found] == [f"data/{i}" for i in range(6)]
    assert [[m["content"] for m in c.messages] for c in found] == [
        [r["question"], r["answer"]] for r in ROWS
    ]
    assert source.skipped == []


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_gzip_file_cut_anywhere_is_noticed(suffix, tmp_path):
    whole = gzip.compress(encoded(suffix, tmp_path))
    path = tmp_path / f"data{suffix}.gz"
    for cut in random.Random(0).sample(range(2, len(whole) - 1), 12):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"[Rr]ecord \d+ of .*data.*(cut off|cannot be read)"):
            read(path)
        source, found = read(path, on_bad="skip")
        assert len(source.skipped) == 1
        assert len(found) < 6 or suffix == ".jsonl"


def test_half_a_json_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(LINES[:-20])
    with pytest.raises(ValueError, match=r"Record 5 of .*data\.jsonl is not valid JSON .*middle"):
        read(path)
    source, found = read(path, on_bad="skip")
    assert len(found) == 5
    assert len(source.skipped) == 1


def test_a_bad_line_inside_keeps_the_numbers_of_the_others(tmp_path):
    lines = LINES.splitlines()
    lines[2] = "{broken"
    lines[4] = '{"foo": 1}'
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    source, found = read(path, on_bad="skip")
    assert [c.id for c in found] == ["data/0", "data/1", "data/3", "data/5"]
    assert "record 2" in source.skipped[0]
    assert "fits no known shape" in source.skipped[1]


def test_a_cut_json_list(tmp_path):
    path = tmp_path / "data.json"
    whole = json.dumps(ROWS)
    path.write_text(whole[: whole.index("what is 3") + 4])
    with pytest.raises(ValueError, match=r"Record 3 of .* is not valid JSON .* at character \d+"):
        read(path)
    path.write_text(whole[:-1])
    with pytest.raises(ValueError, match="without its closing bracket"):
        read(path)


def test_json_lines_under_the_name_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(LINES)
    assert len(read(path)[1]) == 6


def test_csv_faults(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('question,answer\r\n"a","b"\r\n"c"\r\n"d","e"\r\n')
    with pytest.raises(ValueError, match=r"Record 1 of .* has 1 columns, the header 2"):
        read(path)
    assert [c.id for c in read(path, on_bad="skip")[1]] == ["data/0", "data/2"]
    path.write_text('question,answer\r\n"a","b"\r\n"c","open')
    with pytest.raises(ValueError, match=r"Record 1 of .* is not valid CSV"):
        read(path)


def test_parquet_faults(tmp_path):
    whole = encoded(".parquet", tmp_path)
    path = tmp_path / "data.parquet"
    for cut in (0, 10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut off or no parquet"):
            read(path)


def test_plain_text_comes_in_pieces_that_add_up(tmp_path):
    text = "".join(f"line {i} of a long story\n" for i in range(400))
    path = tmp_path / "story.txt"
    path.write_text(text)
    found = read(path)[1]
    assert "".join(c.messages[0]["content"] for c in found) == text
    assert len(found) == 5  # 400 lines of 22 to 24 characters, cut at 2000
    assert all(c.is_text for c in found)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read(path)


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "data.xml").write_text("<x/>")
    with pytest.raises(ValueError, match=r"ends in '.xml'"):
        read(tmp_path / "data.xml")


def test_limit_draws_from_the_whole_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(LINES)
    found = read(path, limit=3)[1]
    assert len(found) == 3
    assert [c.id for c in found] == sorted(c.id for c in found)


def test_settings_follow_the_content_not_the_place(tmp_path):
    (tmp_path / "a").mkdir()
    for folder in (tmp_path, tmp_path / "a"):
        (folder / "data.jsonl").write_text(LINES)
    one, two = Files(path=str(tmp_path / "data.jsonl")), Files(path=str(tmp_path / "a/data.jsonl"))
    assert one.settings() == two.settings()
    (tmp_path / "a/data.jsonl").write_text(LINES + LINES)
    assert one.settings() != two.settings()


def test_eval_folders_are_benchmarks(tmp_path):
    assert "eval folder" in (Files(path=str(tmp_path / "eval" / "x.jsonl")).benchmark or "")
    assert Files(path=str(tmp_path / "prompts" / "x.jsonl")).benchmark is None
