# SPDX-License-Identifier: Apache-2.0
"""`prepare`: equal bytes however it is run or interrupted, and clear errors."""

import dataclasses
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moejax.config import DataConfig
from moejax.data import builder, load_tokenizer, open_stores, prepare
from moejax.data.manifest import read_manifest
from moejax.data.parts import is_validation
from moejax.errors import DataError
from tests.data.corpora import contents, quiet, write_corpus


def config_for(folder, **options):
  options = {"seq_len": 32, "validation_fraction": 0.1} | options
  return DataConfig(
    sources=(str(folder / "corpus"),), store=str(folder / "store"), **options
  )


@pytest.fixture
def corpus(tmp_path):
  write_corpus(tmp_path / "corpus", 600)
  return tmp_path


@pytest.fixture
def small_parts(monkeypatch):
  """Makes a small corpus have several parts, in this process."""
  monkeypatch.setattr("moejax.data.formats.LINES_UNIT", 4096)
  monkeypatch.setattr(builder, "MIN_PART_BYTES", 8192)


SMALL_PARTS = """
import sys
import moejax.data.builder, moejax.data.formats, moejax.data.parts
moejax.data.formats.LINES_UNIT = 4096
moejax.data.builder.MIN_PART_BYTES = 8192
"""


def decode_store(config):
  """Texts of all whole documents that fit in one row, by split."""
  tokenizer = load_tokenizer(config.tokenizer)
  (store,) = open_stores(config, tokenizer).stores
  texts = {}
  for split in ("train", "validation"):
    texts[split] = []
    for number in range(store.rows(split)):
      row = store.read(split, number)
      for segment in range(1, row.segment_ids.max() + 1):
        ids = row.tokens[row.segment_ids == segment]
        if ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id:
          texts[split].append(tokenizer.decode(ids))
  return texts


def test_the_store_holds_the_documents(corpus):
  config = config_for(corpus, seq_len=4096)
  (folder,) = prepare(config, say=quiet)
  records = (corpus / "corpus" / "data.jsonl").read_text().splitlines()
  expected = [json.loads(record)["text"] for record in records]
  texts = decode_store(config)
  fits = [t for t in expected if len(t.encode()) <= 3000]
  found = texts["train"] + texts["validation"]
  assert len(fits) > 500
  assert set(found) <= set(expected)
  manifest = read_manifest(folder)
  # Those missing were cut to fill a row: one a row at most.
  rows = sum(split["rows"] for split in manifest["splits"].values())
  assert len(set(fits) - set(found)) < rows < len(fits) / 10
  assert manifest["documents"] == 600
  assert manifest["tokens"] == sum(len(t.encode()) + 2 for t in expected)
  held_out = [t for t in expected if is_validation(t.encode(), 0.1)]
  assert manifest["validation_documents"] == len(held_out) > 20
  assert not set(texts["train"]) & set(held_out)


def test_counts_of_what_is_odd(tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  (folder / "a.txt").write_bytes(b"bad \xff\xfe bytes")
  (folder / "b.txt").write_text("")
  (folder / "c.txt").write_text(" \n\t ")
  (folder / "d.txt").write_text("x" * 1000)
  lines = []
  config = config_for(tmp_path, validation_fraction=0.0)
  (path,) = prepare(config, say=lines.append)
  manifest = read_manifest(path)
  assert manifest["replaced"] == 2
  assert manifest["empty_documents"] == 2
  assert manifest["documents"] == 2
  assert "2 invalid UTF-8 sequences replaced" in lines[-1]
  assert "2 empty documents skipped" in lines[-1]
  assert "validation" not in manifest["splits"]


def test_real_text_fills_the_rows(shared_data, tmp_path):
  for name, key in [("gsm8k", "question"), ("wikitext-2", "text")]:
    config = DataConfig(
      sources=(str(shared_data / name / "test.*"),), text_key=key, seq_len=256,
      store=str(tmp_path), validation_fraction=0.02,
    )  # fmt: skip
    (folder,) = prepare(config, say=quiet)
    splits = read_manifest(folder)["splits"]
    assert splits["train"]["fill"] >= 0.97, name


def test_two_processes_write_the_bytes_of_one(corpus, monkeypatch):
  monkeypatch.setattr(builder, "MIN_PART_BYTES", 8192)
  for number in range(8):  # files divide it: workers do not see patched units
    write_corpus(corpus / "corpus" / f"{number}", 60, number)
  one = config_for(corpus)
  two = dataclasses.replace(one, store=str(corpus / "two"))
  (a,) = prepare(one, processes=1, say=quiet)
  (b,) = prepare(two, processes=2, say=quiet)
  assert len(read_manifest(a)["splits"]["train"]["shards"]) >= 4
  assert contents(a) == contents(b)


def test_sigkill_and_again_gives_the_same_bytes(corpus, small_parts):
  whole = config_for(corpus)
  (expected,) = prepare(whole, processes=1, say=quiet)
  config = dataclasses.replace(whole, store=str(corpus / "killed"))
  # Slow down, so that the kill meets it between and inside parts.
  program = (
    SMALL_PARTS
    + f"""
import time
from moejax.config import DataConfig
add = moejax.data.parts._ShardWriter.add
def slow(self, tokens):
  time.sleep(0.004)
  add(self, tokens)
moejax.data.parts._ShardWriter.add = slow
moejax.data.builder.prepare(DataConfig(**{dataclasses.asdict(config)!r}))
"""
  )
  for wanted in (1, 3):
    process = subprocess.Popen(
      [sys.executable, "-c", program], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    partial = corpus / "killed" / f"{expected.name}.partial"
    while len(list(partial.glob("part-*.json"))) < wanted:
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (corpus / "killed" / expected.name).exists()
  done = [path.stem.split("-")[1] for path in partial.glob("part-*.json")]
  assert len(done) >= 3
  shards = {
    path.name: path.stat().st_mtime_ns
    for number in done
    for path in partial.glob(f"token_store-train*-{number}-of-*")
  }
  assert len(shards) == len(done)

  lines = []
  prepare(config, processes=1, say=lines.append)
  assert lines[0].startswith(f"going on: {len(done)} of ")
  folder = corpus / "killed" / expected.name
  assert contents(folder) == contents(expected)
  assert not partial.exists()
  for name, time_written in shards.items():  # finished parts are not redone
    assert (folder / name).stat().st_mtime_ns == time_written


def test_workers_end_with_their_parent(corpus):
  for number in range(4):
    write_corpus(corpus / "corpus" / f"{number}", 3000, number)
  config = config_for(corpus)
  program = f"""
import moejax.data.builder
from moejax.config import DataConfig
moejax.data.builder.MIN_PART_BYTES = 8192
moejax.data.builder.prepare(DataConfig(**{dataclasses.asdict(config)!r}),
                            processes=2)
"""
  process = subprocess.Popen(
    [sys.executable, "-c", program], stdout=subprocess.DEVNULL
  )
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  deadline = time.monotonic() + 60
  while len(workers := children.read_text().split()) < 2:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.wait()
  deadline = time.monotonic() + 60
  while any(_alive(pid) for pid in workers):
    assert time.monotonic() < deadline, "a worker outlives its parent"
    time.sleep(0.05)


def _alive(pid):
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return stat.rsplit(")")[-1].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_a_ready_store_is_left_alone(corpus):
  config = config_for(corpus)
  (folder,) = prepare(config, say=quiet)
  before = {p.name: p.stat().st_mtime_ns for p in folder.glob("token_store*")}
  lines = []
  assert prepare(config, say=lines.append) == [folder]
  assert "ready" in lines[-1]
  after = {p.name: p.stat().st_mtime_ns for p in folder.glob("token_store*")}
  assert before == after


def test_what_decides_the_tokens_decides_the_folder(corpus):
  config = config_for(corpus)
  others = [
    dict(seq_len=64), dict(validation_fraction=0.2), dict(text_key="body"),
    dict(sources=(str(corpus),)), dict(store=str(corpus / "elsewhere")),
  ]  # fmt: skip
  tokenizer = load_tokenizer("byte")
  folders = {
    builder.store.store_path(c, c.sources[0], tokenizer)
    for c in [config, *(dataclasses.replace(config, **o) for o in others)]
  }
  assert len(folders) == 6
  name = builder.store.store_path(config, config.sources[0], tokenizer).name
  assert "corpus-byte-T32-" in name


def test_changed_sources_are_named_and_rebuilt_on_request(corpus):
  config = config_for(corpus)
  (folder,) = prepare(config, say=quiet)
  before = contents(folder)
  (corpus / "corpus" / "new.txt").write_text("one more document")
  with pytest.raises(DataError, match=r"has changed .*new.txt.*--rebuild"):
    prepare(config, say=quiet)
  assert contents(folder) == before
  prepare(config, rebuild=True, say=quiet)
  assert read_manifest(folder)["documents"] == 601
  assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_store_is_rebuilt_on_request(corpus):
  config = config_for(corpus)
  (folder,) = prepare(config, say=quiet)
  before = contents(folder)
  shard = next(folder.glob("token_store-train*"))
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(DataError, match=shard.name):
    prepare(config, say=quiet)
  prepare(config, rebuild=True, say=quiet)
  assert contents(folder) == before


def test_leftovers_of_another_plan_are_not_used(corpus):
  config = config_for(corpus)
  (folder,) = prepare(config, say=quiet)
  expected = contents(folder)
  partial = folder.with_name(folder.name + ".partial")
  os.replace(folder, partial)
  (partial / "plan.json").write_text("{}")
  (partial / "part-00000.json").write_text('{"shards": {}}')
  prepare(config, say=quiet)
  assert contents(folder) == expected


def test_a_second_prepare_of_the_same_store_is_refused(corpus):
  config = config_for(corpus)
  tokenizer = load_tokenizer("byte")
  folder = builder.store.store_path(config, config.sources[0], tokenizer)
  partial = folder.with_name(folder.name + ".partial")
  partial.mkdir(parents=True)
  with open(partial / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process is preparing"):
      prepare(config, say=quiet)
  prepare(config, say=quiet)


@pytest.mark.parametrize("texts", [[], [""], [" \n", ""]])
def test_sources_without_text_leave_no_store(tmp_path, texts):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for number, text in enumerate(texts):
    (folder / f"{number}.txt").write_text(text)
  with pytest.raises(DataError, match="corpus has no"):
    prepare(config_for(tmp_path), say=quiet)
  assert not list(tmp_path.glob("store/*"))


def test_bad_input_leaves_no_store_and_can_be_mended(corpus):
  config = config_for(corpus)
  with open(corpus / "corpus" / "data.jsonl", "a") as f:
    f.write("not json\n")
  with pytest.raises(DataError, match=r"data.jsonl, the line at byte \d+: not"):
    prepare(config, processes=1, say=quiet)
  assert [p.suffix for p in (corpus / "store").iterdir()] == [".partial"]
  write_corpus(corpus / "corpus", 600)
  prepare(config, say=quiet)
  assert [p.suffix for p in (corpus / "store").iterdir()] != [".partial"]


def test_an_error_in_a_worker_is_the_same_one_line(corpus, monkeypatch):
  monkeypatch.setattr(builder, "MIN_PART_BYTES", 8192)
  for number in range(4):
    write_corpus(corpus / "corpus" / f"{number}", 100, number)
  with open(corpus / "corpus" / "2" / "data.jsonl", "a") as f:
    f.write("not json\n")
  with pytest.raises(DataError, match=r"2/data.jsonl, the line at byte \d+"):
    prepare(config_for(corpus), processes=2, say=quiet)


def test_a_full_disk_is_one_line_and_leaves_no_store(corpus):
  """A limit on file size fails a write as a full disk does."""
  config = config_for(corpus)
  program = f"""
import resource, signal
from moejax.config import DataConfig
from moejax.data import prepare
from moejax.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
  prepare(DataConfig(**{dataclasses.asdict(config)!r}), say=print)
except DataError as e:
  assert "cannot write" in str(e) and "File too large" in str(e), e
  assert len(str(e).splitlines()) == 1
else:
  raise SystemExit("no error")
"""
  subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
  (partial,) = (corpus / "store").iterdir()
  assert partial.suffix == ".partial"
  assert not list(partial.glob("token_store*"))
  prepare(config, say=quiet)


def test_an_unwritable_store_is_one_line(corpus):
  (corpus / "store").write_text("a file is in the way")
  with pytest.raises(DataError, match=r"cannot write .*store"):
    prepare(config_for(corpus), say=quiet)


def test_held_out_documents_are_chosen_by_their_text():
  rng = np.random.default_rng(0)
  texts = [rng.bytes(20) for _ in range(20_000)]
  chosen = [is_validation(text, 0.1) for text in texts]
  assert 0.09 < np.mean(chosen) < 0.11
  # A larger share keeps what was held out before.
  assert all(is_validation(t, 0.2) for t, c in zip(texts, chosen) if c)
  assert not any(is_validation(t, 0.0) for t in texts)
