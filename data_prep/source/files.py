"""Local files: jsonl, a JSON list, csv, tsv, parquet or txt, each also as .gz."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.conversation import Conversation, spread
from data_prep.source.base import Source
from data_prep.source.shapes import ShapeError, to_conversation

TEXT_PIECE = 2_000
"""Characters after which a .txt file is cut, at the next end of a line."""


@dataclass(frozen=True)
class Broken:
    """A place where a file cannot be read. `number` counts records from 0, as ids do."""

    number: int
    reason: str
    fatal: bool
    """True when nothing behind this place can be read either."""


@dataclass(kw_only=True)
class Files(Source):
    """Every record of one file.

    `limit` draws that many records, spread evenly over the file. With on_bad="skip" a record that
    cannot be read is reported and left out; the default is to stop at the first.
    """

    path: str
    limit: int | None = None
    on_bad: Literal["error", "skip"] = "error"
    name: str | None = None

    @property
    def benchmark(self) -> str | None:
        if "/eval/" in Path(self.path).expanduser().absolute().as_posix():
            return f"it lies in an eval folder ({self.path})"
        return None

    def settings(self) -> dict[str, Any]:
        """The file's name and size stand for its place: a folder may be moved."""
        path = Path(self.path).expanduser()
        size = path.stat().st_size if path.is_file() else None
        return super().settings() | {"path": path.name, "bytes": size}

    def read(self) -> Iterator[Conversation]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ValueError(
                f"source.path='{self.path}' is not a file (looked at {path.absolute()}); give the "
                "path of a .jsonl, .json, .csv, .tsv, .parquet or .txt file, or the same with .gz."
            )
        self.skipped.clear()
        yield from spread(list(self._read_all(path)), self.limit)
        self.report(str(path))

    def _read_all(self, path: Path) -> Iterator[Conversation]:
        name = self.name or path.name.split(".")[0]
        for number, record in enumerate(records(path)):
            if isinstance(record, Broken):
                self._bad(path, record.number, record.reason)
                continue
            try:
                yield to_conversation(record, id=f"{name}/{number}")
            except ShapeError as error:
                self._bad(path, number, str(error))

    def _bad(self, path: Path, number: int, reason: str) -> None:
        sentence = f"record {number} of {path} {reason}"
        if self.on_bad == "error":
            raise ValueError(
                f"{sentence[0].upper()}{sentence[1:]}. Repair the file, or set on_bad: skip on "
                "this source to leave such records out (each is reported)."
            )
        self.skipped.append(sentence)


def records(path: Path) -> Iterator[Any]:
    """The raw records of a file, with a `Broken` in the place of each that cannot be read."""
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    readers = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _tsv,
        ".txt": _text,
    }
    if suffix not in readers:
        raise ValueError(
            f"{path} ends in '{suffix}', which no reader is for; expected one of "
            f"{', '.join((*readers, '.parquet'))}, or the same with .gz."
        )
    # csv must see the line ends as they are; the others read them as "\n".
    with _open_text(path, newline="" if suffix in (".csv", ".tsv") else None) as file:
        yield from readers[suffix](file)


def _open_text(path: Path, newline: str | None) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


UNREADABLE = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)


def _cut(number: int, error: Exception) -> Broken:
    """The bytes stop making sense: a download that broke off, or no text at all."""
    if isinstance(error, UnicodeDecodeError):
        return Broken(number, f"is not UTF-8 text ({error})", True)
    return Broken(number, f"cannot be unpacked: the file is cut off or damaged ({error})", True)


def _json_lines(file: IO[str]) -> Iterator[Any]:
    number = 0
    try:
        for line in file:
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                where = "" if line.endswith("\n") else ", and the file ends in the middle of it"
                yield Broken(number, f"is not valid JSON ({error.msg}{where})", False)
            number += 1
    except UNREADABLE as error:
        yield _cut(number, error)


def _json(file: IO[str]) -> Iterator[Any]:
    """A JSON list, read element by element so that a broken one can be named; or JSON lines."""
    try:
        text = file.read()
    except UNREADABLE as error:
        yield _cut(0, error)
        return
    if not text.lstrip().startswith("["):
        yield from _json_lines(io.StringIO(text))
        return
    decoder = json.JSONDecoder()
    at, number = _after_space(text, text.index("[") + 1), 0
    while at < len(text) and text[at] != "]":
        try:
            record, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield Broken(number, f"is not valid JSON ({error.msg} at character {error.pos})", True)
            return
        yield record
        number += 1
        at = _after_space(text, at)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    if text[at : at + 1] != "]":
        yield Broken(number, "is missing: the list ends without its closing bracket", True)


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _csv(file: IO[str], delimiter: str = ",") -> Iterator[Any]:
    """Rows under a header. Strict: an open quote at the end or a missing column is an error."""
    csv.field_size_limit(2**31 - 1)
    number = 0
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        for row in rows:
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            elif row:
                yield Broken(number, f"has {len(row)} columns, the header {len(header)}", False)
            else:
                continue  # a blank line is no record
            number += 1
    except csv.Error as error:
        yield Broken(number, f"is not valid CSV ({error})", True)
    except UNREADABLE as error:
        yield _cut(number, error)


def _tsv(file: IO[str]) -> Iterator[Any]:
    yield from _csv(file, "\t")


def _text(file: IO[str]) -> Iterator[Any]:
    """Plain text in pieces of about `TEXT_PIECE` characters, cut at line ends."""
    piece, size, number = [], 0, 0
    try:
        for line in file:
            piece.append(line)
            size += len(line)
            if size >= TEXT_PIECE:
                text = "".join(piece)
                piece, size = [], 0
                if text.strip():
                    yield {"text": text}
                    number += 1
    except UNREADABLE as error:
        yield _cut(number, error)
        return
    if "".join(piece).strip():
        yield {"text": "".join(piece)}


def _parquet(path: Path) -> Iterator[Any]:
    try:
        if path.suffix == ".gz":
            table = pq.read_table(io.BytesIO(gzip.decompress(path.read_bytes())))
        else:
            table = pq.read_table(path)
    except (*UNREADABLE, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        yield Broken(0, f"cannot be read: the file is cut off or no parquet ({reason})", True)
        return
    yield from table.to_pylist()
