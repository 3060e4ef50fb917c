# SPDX-License-Identifier: Apache-2.0
"""Reads documents from text, JSON-lines and Parquet files, by units.

A unit is what can be found without reading the rest of the file: a 16 KiB
stretch of a large text file, 1 MiB of JSON lines, a Parquet row group; small
and compressed files are one unit. A document belongs to the unit it begins in.
"""

import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from moejax.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
# A text file above this size is a dump of many documents rather than one: it is
# cut, at blank lines where there are any, so that some of it can be validation.
DUMP_BYTES = 256 << 10
DUMP_UNIT = 16 << 10
LINES_UNIT = 1 << 20
_GZIP_RATIO = 3.0  # for progress only
_BOM = b"\xef\xbb\xbf"
_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Document:
  """Text, and how many invalid UTF-8 sequences or code points it replaces."""

  text: str
  replaced: int


def is_readable(name: str) -> bool:
  return name.endswith(SUFFIXES)


def count_units(path: pathlib.Path) -> tuple[int, float]:
  """(units, bytes of text in each, roughly) of a file.

  Raises:
    DataError: the file cannot be read, or is not what its suffix says.
  """
  try:
    size = path.stat().st_size
  except OSError as e:
    raise DataError(f"cannot read {path}: {e.strerror}") from None
  if path.name.endswith(".gz"):
    return 1, size * _GZIP_RATIO
  if path.name.endswith(".parquet"):
    with _open_parquet(path) as file:
      groups = file.metadata.num_row_groups
      total = sum(
        file.metadata.row_group(i).total_byte_size for i in range(groups)
      )
    return groups, total / max(1, groups)
  unit = LINES_UNIT if path.name.endswith(".jsonl") else DUMP_UNIT
  if size <= (LINES_UNIT if path.name.endswith(".jsonl") else DUMP_BYTES):
    return 1, size
  return -(-size // unit), unit


def read_units(
  path: pathlib.Path, start: int, stop: int, text_key: str
) -> Iterator[Document]:
  """Documents that begin in units [start, stop) of a file.

  Raises:
    DataError: unreadable or damaged; names the file, and the line or record.
  """
  try:
    if path.name.endswith(".parquet"):
      yield from _read_parquet(path, start, stop, text_key)
    elif path.name.endswith(".jsonl.gz"):
      with gzip.open(path, "rb") as f:
        yield from _json_lines(f, path, text_key, None)
    elif path.name.endswith(".txt.gz"):
      with gzip.open(path, "rb") as f:
        yield from _stream_text(f)
    elif path.name.endswith(".jsonl"):
      yield from _read_jsonl(path, start, stop, text_key)
    else:
      yield from _read_text(path, start, stop)
  except (OSError, EOFError, zlib.error) as e:
    reason = getattr(e, "strerror", None) or e
    raise DataError(f"cannot read {path}: {reason}") from None


def document(value: Any, where: str) -> Document:
  """A document of a record's field: text or UTF-8 bytes; null is empty text.

  Raises:
    DataError: the field holds something else; names the record.
  """
  if isinstance(value, bytes):
    return _decode(value)
  value = "" if value is None else value
  if not isinstance(value, str):
    raise DataError(
      f"{where}: the text field holds a {type(value).__name__}, not text"
    )
  try:
    value.encode()
    return Document(value, 0)
  except UnicodeEncodeError:  # lone surrogates, which JSON can spell
    text = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(text, text.count(_REPLACEMENT) - value.count(_REPLACEMENT))


def _decode(data: bytes) -> Document:
  try:
    return Document(data.decode(), 0)
  except UnicodeDecodeError:
    text = data.decode(errors="replace")
    there = data.count(_REPLACEMENT.encode())
    return Document(text, text.count(_REPLACEMENT) - there)


def _read_text(path: pathlib.Path, start: int, stop: int) -> Iterator[Document]:
  size = path.stat().st_size
  with open(path, "rb") as f:
    if size <= DUMP_BYTES:
      yield _decode(f.read().removeprefix(_BOM))
      return
    begin = _dump_cut(f, start, size)
    for unit in range(start, stop):
      end = _dump_cut(f, unit + 1, size)
      f.seek(begin)
      data = f.read(end - begin)
      yield _decode(data.removeprefix(_BOM) if begin == 0 else data)
      begin = end


def _dump_cut(f: BinaryIO, unit: int, size: int) -> int:
  """Where document number `unit` of a large text file begins.

  It depends on the bytes of that unit alone: after its first blank line, or
  its first line end, or else at its first whole character.
  """
  offset = unit * DUMP_UNIT
  if unit == 0 or offset >= size:
    return min(offset, size)
  f.seek(offset)
  return offset + _cut_within(f.read(DUMP_UNIT))


def _cut_within(data: bytes) -> int:
  """Where in the bytes of a unit its document begins."""
  for mark in (b"\n\n", b"\n\r\n", b"\n"):
    at = data.find(mark)
    if at >= 0:
      return at + len(mark)
  begin = 0
  while begin < min(4, len(data)) and data[begin] & 0xC0 == 0x80:
    begin += 1
  return begin


def _stream_text(f: gzip.GzipFile) -> Iterator[Document]:
  """What `_read_text` yields of the same text in a plain file.

  In one pass: going back in a compressed file reads it anew from its start.
  """
  head = f.read(DUMP_BYTES + 1)
  if len(head) <= DUMP_BYTES:
    yield _decode(head.removeprefix(_BOM))
    return
  f.seek(0)
  pending = f.read(DUMP_UNIT).removeprefix(_BOM)
  while unit := f.read(DUMP_UNIT):
    cut = _cut_within(unit)
    yield _decode(pending + unit[:cut])
    pending = unit[cut:]
  yield _decode(pending)


def _read_jsonl(
  path: pathlib.Path, start: int, stop: int, text_key: str
) -> Iterator[Document]:
  with open(path, "rb") as f:
    if start > 0:
      # The line across the border belongs to the unit before.
      f.seek(start * LINES_UNIT - 1)
      f.readline()
    whole = path.stat().st_size <= LINES_UNIT
    yield from _json_lines(
      f, path, text_key, None if whole else stop * LINES_UNIT
    )


def _json_lines(
  f: BinaryIO | gzip.GzipFile,
  path: pathlib.Path,
  text_key: str,
  end: int | None,
) -> Iterator[Document]:
  """Documents of the lines that begin before byte `end`."""
  while True:
    offset = f.tell()
    if end is not None and offset >= end:
      return
    line = f.readline()
    if not line:
      return
    line = line.removeprefix(_BOM) if offset == 0 else line
    if not line.strip():
      continue
    where = f"{path}, the line at byte {offset}"
    text = _decode(line)
    try:
      record = json.loads(text.text)
    except (ValueError, RecursionError) as e:
      raise DataError(f"{where}: not JSON: {e}") from None
    doc = document(_field(record, text_key, where), where)
    yield Document(doc.text, doc.replaced + text.replaced)


def _field(record: Any, text_key: str, where: str) -> Any:
  if not isinstance(record, dict):
    raise DataError(f"{where}: a {type(record).__name__}, not an object")
  if text_key not in record:
    raise DataError(
      f"{where}: no field {text_key!r}; set data.text_key to one of "
      f"{', '.join(record) or 'its fields'}"
    )
  return record[text_key]


def _open_parquet(path: pathlib.Path) -> Any:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise DataError(
      f"reading {path} needs pyarrow; run: pip install 'moejax[parquet]'"
    ) from None
  try:
    return pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowInvalid, OSError) as e:
    raise DataError(f"{path} is not a Parquet file: {e}") from None


def _read_parquet(
  path: pathlib.Path, start: int, stop: int, text_key: str
) -> Iterator[Document]:
  import pyarrow

  with _open_parquet(path) as file:
    names = file.schema_arrow.names
    if text_key not in names:
      raise DataError(
        f"{path}: no column {text_key!r}; set data.text_key to one of "
        f"{', '.join(names)}"
      )
    try:
      batches = file.iter_batches(
        row_groups=list(range(start, stop)), columns=[text_key], batch_size=256
      )
      for batch in batches:
        for value in batch.column(0):
          yield document(value.as_py(), f"{path}, column {text_key!r}")
    except pyarrow.ArrowException as e:
      raise DataError(f"cannot read {path}: {e}") from None
