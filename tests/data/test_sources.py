# SPDX-License-Identifier: Apache-2.0
"""Sources: every format, damaged input, and division into parts."""

import gzip
import json
import os
import sys

import numpy as np
import pytest

from moejax.data import formats, sources
from moejax.data.sources import Slice, open_source, plan_parts
from moejax.errors import DataError


def read_all(spec, text_key="text"):
  """Documents of a source, read unit by unit."""
  source = open_source(str(spec), text_key)
  return [
    doc
    for number, file in enumerate(source.units())
    for unit in range(file.count)
    for doc in source.documents(Slice(number, unit, unit + 1))
  ]


def read_texts(spec, text_key="text"):
  return [doc.text for doc in read_all(spec, text_key)]


def write_lines(path, records, opener=open):
  with opener(path, "wt", encoding="utf-8") as f:
    f.writelines(json.dumps(record) + "\n" for record in records)


TEXTS = ["first", "zweites mit ä", "", "中文\nline two", "a\u0000b"]


def test_text_files_in_a_folder_come_in_order(tmp_path):
  for name, text in [("b.md", "B"), ("a/z.py", "Z"), ("a.txt", "A")]:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  (tmp_path / "picture.png").write_bytes(b"\x89PNG")
  (tmp_path / ".hidden.txt").write_text("no")
  (tmp_path / ".git").mkdir()
  (tmp_path / ".git" / "x.txt").write_text("no")
  assert read_texts(tmp_path) == ["A", "Z", "B"]
  assert open_source(str(tmp_path), "text").names == [
    "a.txt", "a/z.py", "b.md"
  ]  # fmt: skip
  assert read_texts(tmp_path / "a" / "z.py") == ["Z"]
  assert read_texts(tmp_path / "*.txt") == ["A"]
  assert read_texts(tmp_path / "**" / "*.py") == ["Z"]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_json_lines(tmp_path, suffix):
  path = tmp_path / f"data.{suffix}"
  opener = gzip.open if suffix.endswith("gz") else open
  write_lines(path, [{"text": t, "n": 1} for t in TEXTS], opener)
  assert read_texts(path) == TEXTS


@pytest.mark.parametrize("mark", ["\n\n", "\n", ""])
@pytest.mark.parametrize("size", [100, 20_000, 20_481])
def test_compressed_text_is_cut_as_plain_text_is(
  tmp_path, monkeypatch, size, mark
):
  monkeypatch.setattr(formats, "DUMP_BYTES", 4096)
  monkeypatch.setattr(formats, "DUMP_UNIT", 1024)
  words = np.random.default_rng(0).integers(0, 99, size)
  text = "\ufeff" + "".join(f"ä{w}{mark if w == 7 else ''}" for w in words)
  (tmp_path / "a.txt").write_text(text)
  (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
  plain = read_texts(tmp_path / "a.txt")
  assert (len(plain) > 9) == (size > 100)
  assert read_texts(tmp_path / "b.txt.gz") == plain


def test_json_lines_are_read_once_however_they_are_divided(
  tmp_path, monkeypatch
):
  path = tmp_path / "data.jsonl"
  texts = [f"{n} " + "x" * (n % 37) for n in range(200)]
  write_lines(path, [{"text": t} for t in texts])
  for unit in (1, 7, 64, 1000):
    monkeypatch.setattr(formats, "LINES_UNIT", unit)
    assert read_texts(path) == texts


def test_parquet(tmp_path):
  pa = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  path = tmp_path / "data.parquet"
  table = pa.table({"content": [*TEXTS, None], "id": range(len(TEXTS) + 1)})
  parquet.write_table(table, path, row_group_size=2)
  assert read_texts(path, "content") == [*TEXTS, ""]
  with pytest.raises(DataError, match=r"no column 'text'.*content, id"):
    read_texts(path)
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(DataError, match=r"data.parquet is not a Parquet file"):
    read_texts(path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
  (tmp_path / "x.parquet").write_bytes(b"PAR1")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(DataError, match=r"pip install 'moejax\[parquet\]'"):
    read_texts(tmp_path)


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
  good = "schön \ufffd ok"  # one that belongs to the text is not counted
  (tmp_path / "a.txt").write_bytes(b"a\xffb\xc3\x28 " + good.encode())
  (doc,) = read_all(tmp_path)
  assert doc.text == "a\ufffdb\ufffd( " + good
  assert doc.replaced == 2

  path = tmp_path / "b.jsonl"
  path.write_bytes(
    b'{"text": "a\xff"}\n{"text": "lone \\ud800 \\ud83d\\ude00"}\n'
  )
  one, two = read_all(path)
  assert (one.text, one.replaced) == ("a\ufffd", 1)
  assert (two.text, two.replaced) == ("lone \ufffd 😀", 1)


def test_byte_order_marks_are_no_text(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
  (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
  assert read_texts(tmp_path) == ["hello", "line"]


@pytest.mark.parametrize("paragraphs", [True, False])
def test_a_large_text_is_cut_without_losing_a_byte(tmp_path, paragraphs):
  rng = np.random.default_rng(0)
  words = ["wort", "mot", "слово", "言葉", "word"]
  gap = "\n\n" if paragraphs else " "
  text = gap.join(" ".join(rng.choice(words, 60)) for _ in range(2000))
  path = tmp_path / "dump.txt"
  path.write_text(text)
  documents = read_all(path)
  assert "".join(doc.text for doc in documents) == text
  assert sum(doc.replaced for doc in documents) == 0
  assert len(documents) == -(-len(text.encode()) // formats.DUMP_UNIT)
  if paragraphs:
    assert all(doc.text.startswith(tuple(words)) for doc in documents)
  # A range of units gives the same documents as the units one by one.
  source = open_source(str(path), "text")
  assert list(source.documents(Slice(0, 3, 9))) == documents[3:9]


def test_invalid_bytes_in_a_large_text_do_not_stop_it(tmp_path):
  data = b"\x80\xff" * formats.DUMP_BYTES
  (tmp_path / "dump.txt").write_bytes(data)
  documents = read_all(tmp_path / "dump.txt")
  assert sum(doc.replaced for doc in documents) == len(data)


@pytest.mark.parametrize(
  "content, message",
  [
    ('{"text": "a"}\nnot json\n', "data.jsonl, the line at byte 14: not JSON"),
    ('{"body": "a", "id": 1}\n', "no field 'text'; .*body, id"),
    ('{"text": 3}\n', "byte 0: the text field holds a int"),
    ('["text"]\n', "byte 0: a list, not an object"),
    ("[" * 100_000 + "\n", "byte 0: not JSON"),
  ],
)
def test_bad_records_are_named(tmp_path, content, message):
  (tmp_path / "data.jsonl").write_text(content)
  with pytest.raises(DataError, match=message):
    read_texts(tmp_path)


def test_a_damaged_gzip_file_is_named(tmp_path):
  path = tmp_path / "data.jsonl.gz"
  write_lines(path, [{"text": "x" * 1000}] * 50, gzip.open)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(DataError, match=r"cannot read .*data.jsonl.gz"):
    read_texts(path)
  path.write_bytes(b"not gzip")
  with pytest.raises(DataError, match=r"cannot read .*data.jsonl.gz"):
    read_texts(path)


def test_sources_that_are_not_there(tmp_path):
  (tmp_path / "picture.png").write_bytes(b"\x89PNG")
  for spec, message in [
    (tmp_path / "nothing", "'.*nothing' is not there; name python-stdlib"),
    (tmp_path / "*.txt", r"no file of .* matches"),
    (tmp_path, "has no files of .txt"),
    (tmp_path / "picture.png", "is none of .txt"),
    ("python-stdlb", "'python-stdlb' is not there"),
  ]:
    with pytest.raises(DataError, match=message) as caught:
      open_source(str(spec), "text")
    assert "\n" not in str(caught.value)


def test_a_file_that_vanishes_is_named(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  source = open_source(str(tmp_path), "text")
  (tmp_path / "a.txt").unlink()
  for read in (
    source.units,
    lambda: list(source.documents(Slice(0, 0, 1))),
    lambda: source.digests({}, lambda count: None),
  ):
    with pytest.raises(DataError, match=r"cannot read .*a.txt: No such file"):
      read()


def test_digests_follow_the_content_and_reuse_what_is_known(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("one")
  source = open_source(str(path), "text")
  first = source.digests({}, lambda count: None)
  assert first["a.txt"]["size"] == 3

  known = {"a.txt": first["a.txt"] | {"sha256": "remembered"}}
  again = source.digests(known, lambda count: None)
  assert again["a.txt"]["sha256"] == "remembered"

  path.write_text("two")
  os.utime(path, ns=(0, 0))
  changed = source.digests(known, lambda count: None)
  assert changed["a.txt"]["sha256"] not in (
    "remembered", first["a.txt"]["sha256"]
  )  # fmt: skip


def test_the_standard_library(monkeypatch):
  source = open_source("python-stdlib", "text")
  assert "argparse.py" in source.names
  assert source.names == sorted(source.names)
  assert not any("site-packages" in n or "/test" in n for n in source.names)
  number = source.names.index("argparse.py")
  (doc,) = source.documents(Slice(number, 0, 1))
  assert "class ArgumentParser" in doc.text and doc.replaced == 0
  total = sum(f.count * f.unit_bytes for f in source.units())
  assert 5e6 < total < 50e6
  # Another Python has another library: it is another source.
  monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
  assert sources.identity("python-stdlib") != source.identity


@pytest.mark.parametrize("part_bytes", [1, 10, 100, 10_000])
def test_parts_cover_all_units_once_and_in_order(part_bytes):
  rng = np.random.default_rng(part_bytes)
  units = [
    sources.FileUnits(int(count), float(size))
    for count, size in zip(rng.integers(0, 9, 50), rng.integers(0, 40, 50))
  ]
  parts = plan_parts(units, part_bytes)
  seen = [
    (piece.file, unit)
    for part in parts
    for piece in part
    for unit in range(piece.start, piece.stop)
  ]
  assert seen == [
    (number, unit)
    for number, file in enumerate(units)
    for unit in range(file.count)
  ]
  for part in parts:
    size = sum((p.stop - p.start) * units[p.file].unit_bytes for p in part)
    assert size <= part_bytes + 40
