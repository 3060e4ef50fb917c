# SPDX-License-Identifier: Apache-2.0
"""Batches: a function of seed and step, whoever reads them and however."""

import dataclasses
import gc
import itertools
import pickle
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

from moejax.config import DataConfig
from moejax.data import (
  Shards,
  file_batches,
  load_batches,
  load_tokenizer,
  loader,
  validation_batches,
)
from moejax.data.packing import model_inputs
from moejax.errors import DataError
from tests.data.corpora import make_stores

B = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("loader")
  return make_stores(folder, (300, 40, 120), weights=(0.6, 0.1, 0.3))


def take(made, count, seed=3, split="train", **kwargs):
  config, stores = made
  config = dataclasses.replace(config, num_workers=kwargs.pop("num_workers", 0))
  with load_batches(stores, config, split, B, seed, **kwargs) as batches:
    return list(itertools.islice(batches, count))


def assert_equal(some, others):
  assert len(some) == len(others)
  for a, b in zip(some, others):
    assert a.keys() == b.keys()
    for key in a:
      assert a[key].dtype == b[key].dtype
      assert np.array_equal(a[key], b[key]), key


def test_shapes_and_types(made):
  (batch,) = take(made, 1)
  T = made[0].seq_len
  for key in ("tokens", "targets", "segment_ids", "positions"):
    assert batch[key].shape == (B, T) and batch[key].dtype == np.int32
  assert batch["loss_mask"].shape == (B, T)
  assert batch["loss_mask"].dtype == bool
  assert batch["source"].shape == (B,) and batch["source"].dtype == np.int32
  assert batch["row"].shape == (B,) and batch["row"].dtype == np.int64
  assert {type(x) for x in batch.values()} == {np.ndarray}


def test_rows_are_those_that_the_batch_names(made):
  for batch in take(made, 3):
    for b in range(B):
      store = made[1].stores[batch["source"][b]]
      row = store.read("train", int(batch["row"][b]))
      for key, value in model_inputs(row.tokens, row.segment_ids).items():
        assert np.array_equal(batch[key][b], value), key


def test_the_same_seed_gives_the_same_batches_and_another_others(made):
  assert_equal(take(made, 4), take(made, 4))
  rows = [batch["row"].tolist() for batch in take(made, 4)]
  assert rows != [batch["row"].tolist() for batch in take(made, 4, seed=4)]


@pytest.mark.parametrize("shard_count", [2, 4, 8])
def test_shards_one_after_another_are_the_global_batch(made, shard_count):
  whole = take(made, 5, start_step=2)
  shards = [
    take(made, 5, start_step=2, shards=Shards.even(B, i, shard_count))
    for i in range(shard_count)
  ]
  joined = [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*shards)
  ]
  assert_equal(joined, whole)


def test_shards_need_not_be_neighbouring_rows(made):
  rows = ((0, 5, 6, 3), (7, 1, 2, 4))
  whole = take(made, 5, start_step=2)
  for index, mine in enumerate(rows):
    part = take(made, 5, start_step=2, shards=Shards(index, rows))
    picked = [{k: x[list(mine)] for k, x in batch.items()} for batch in whole]
    assert_equal(part, picked)


def test_a_jump_is_a_walk(made):
  assert_equal(take(made, 3, start_step=40), take(made, 43)[40:])


def test_a_jump_takes_no_longer_for_being_far(made):
  start = time.monotonic()
  (batch,) = take(made, 1, start_step=10**9)
  assert time.monotonic() - start < 5
  assert batch["tokens"].shape == (B, made[0].seq_len)


def test_reader_processes_change_nothing(made):
  kwargs = dict(start_step=3, shards=Shards.even(B, 1, 2))
  inline = take(made, 12, **kwargs)
  assert_equal(take(made, 12, num_workers=2, **kwargs), inline)


def test_each_source_is_read_once_an_epoch_in_another_order(tmp_path):
  made = make_stores(tmp_path, (10, 3, 5), weights=(0.5, 0.2, 0.3))
  _, stores = made
  rows = {s: [] for s in range(3)}
  for batch in take(made, 100):
    for s, row in zip(batch["source"], batch["row"]):
      rows[int(s)].append(int(row))
  for s, store in enumerate(stores.stores):
    n = store.rows("train")
    epochs = [rows[s][i : i + n] for i in range(0, len(rows[s]) - n + 1, n)]
    assert len(epochs) >= 2, "the test needs more batches"
    for epoch in epochs:
      assert sorted(epoch) == list(range(n))
    assert epochs[0] != epochs[1]


def test_neighbouring_seeds_do_not_share_epochs(made):
  """Grain's own shuffle of seed s + 1 is the second epoch of seed s."""
  n = made[1].stores[1].rows("train")
  config, stores = made
  alone = dataclasses.replace(stores, weights=(0.0, 1.0, 0.0))
  orders = []
  for seed in (0, 1):
    batches = take((config, alone), -(-2 * n // B), seed=seed)
    orders.append(np.concatenate([b["row"] for b in batches]))
  assert not np.array_equal(orders[0][n : 2 * n], orders[1][:n])


def test_weights_are_shares_of_rows(made):
  sources = np.concatenate([b["source"] for b in take(made, 100)])
  share = np.bincount(sources) / len(sources)
  assert np.abs(share - [0.6, 0.1, 0.3]).max() <= 1 / len(sources)


def test_without_weights_sources_are_mixed_by_size(tmp_path):
  _, stores = make_stores(tmp_path, (100, 30))
  total = stores.rows("train")
  config = DataConfig(sources=("a", "b"), seq_len=32)
  with load_batches(stores, config, "train", 1, 0) as batches:
    seen = [
      (int(b["source"][0]), int(b["row"][0]))
      for b in itertools.islice(batches, total)
    ]
  assert len(set(seen)) == total


def test_validation_is_each_row_once_in_a_fixed_order(made):
  config, stores = made
  runs = []
  for _ in range(2):
    with validation_batches(stores, B) as batches:
      runs.append(list(batches))
  assert_equal(*runs)
  total = stores.rows("validation")
  assert len(runs[0]) == -(-total // B) and total % B
  seen = [
    (int(s), int(row))
    for batch in runs[0]
    for s, row in zip(batch["source"], batch["row"])
  ]
  padding = len(runs[0]) * B - total
  assert seen[total:] == [(-1, -1)] * padding
  assert len(set(seen[:total])) == total
  last = runs[0][-1]
  assert last["tokens"].shape == (B, config.seq_len)
  assert (last["segment_ids"][B - padding :] == 0).all()
  assert not last["loss_mask"][B - padding :].any()


def test_validation_shards_and_limits(made):
  config, stores = made
  whole = list(validation_batches(stores, B, 3))
  assert len(whole) == 3
  shards = [
    list(validation_batches(stores, B, 3, shards=Shards.even(B, i, 2)))
    for i in range(2)
  ]
  joined = [
    {key: np.concatenate([a[key], b[key]]) for key in a}
    for a, b in zip(*shards)
  ]
  assert_equal(joined, whole)
  # The first batches are a sample of all sources.
  assert len(set(whole[0]["source"]) | set(whole[1]["source"])) == 3


def test_no_validation_rows_tells_which_option_to_change(tmp_path):
  config, stores = make_stores(tmp_path, (20,), validation_fraction=0.0)
  assert stores.rows("validation") == 0
  with pytest.raises(DataError, match=r"data\.validation_fraction"):
    validation_batches(stores, B)
  with pytest.raises(DataError, match="no validation rows"):
    load_batches(stores, config, "validation", B, 0)


def test_ids_outside_the_vocabulary_name_source_and_row(made):
  config, stores = made
  small = dataclasses.replace(stores, vocab_size=200)
  with (
    load_batches(small, config, "train", B, 0) as batches,
    pytest.raises(DataError, match=r"corpus\d, train row \d+: token id 2"),
  ):
    next(batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_record_is_named(tmp_path, num_workers):
  config, stores = make_stores(
    tmp_path, (100,), num_workers=num_workers, seq_len=512
  )
  (store,) = stores.stores
  path = store.folder / store.shards("train")[0]["name"]
  data = bytearray(path.read_bytes())
  data[1000] ^= 1
  path.write_bytes(data)
  count = -(-store.rows("train") // B)
  with (
    load_batches(stores, config, "train", B, 0) as batches,
    pytest.raises(DataError, match=rf"{path.name}: row \d+ is unreadable"),
  ):
    list(itertools.islice(batches, count))


def test_uneven_shards_are_refused():
  with pytest.raises(ValueError, match="8 rows do not divide by 3"):
    Shards.even(B, 0, 3)


def test_closing_ends_the_readers(made):
  before = set(threading.enumerate())
  batches = load_batches(made[1], made[0], "train", B, 0)
  next(batches)
  assert set(threading.enumerate()) - before
  batches.close()
  batches.close()
  deadline = time.monotonic() + 10
  while set(threading.enumerate()) - before:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  with pytest.raises(ValueError, match="closed"):
    next(batches)


def test_what_is_collected_waits_for_no_thread(made, monkeypatch):
  """Python collects also while it holds the locks that a wait would need."""
  waits = []
  monkeypatch.setattr(threading.Thread, "join", lambda *_: waits.append(1))
  before = set(threading.enumerate())
  batches = validation_batches(made[1], B)
  next(batches)
  batches.itself = batches  # only the collector frees it
  freed = weakref.ref(batches)
  del batches
  gc.collect()
  assert freed() is None and not waits
  deadline = time.monotonic() + 10
  while set(threading.enumerate()) - before:
    assert time.monotonic() < deadline
    time.sleep(0.01)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_program_that_forgets_to_close_ends_quietly(made, num_workers):
  """No `__main__` guard, no absl flags, a batch still held: as scripts are."""
  config = dataclasses.replace(made[0], num_workers=num_workers)
  program = f"""
import sys
from moejax.config import DataConfig
from moejax.data import load_batches, load_tokenizer, open_stores
if __name__ == "__main__":
  config = DataConfig(**{dataclasses.asdict(config)!r})
  stores = open_stores(config, load_tokenizer("byte"))
  batches = load_batches(stores, config, "train", 4, 0)
  batch = next(batches)
  print("one batch")
"""
  path = made[1].stores[0].folder.parent / f"program{num_workers}.py"
  path.write_text(program)
  result = subprocess.run(
    [sys.executable, str(path)], capture_output=True, text=True, timeout=100,
    env={"PYTHONPATH": ".", "PATH": "", "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert (result.returncode, result.stdout) == (0, "one batch\n"), result.stderr
  assert result.stderr == ""


def test_batches_of_files(tmp_path):
  (tmp_path / "a.txt").write_text("first file " * 20)
  (tmp_path / "b.txt").write_text("second")
  config = DataConfig(seq_len=32)
  tokenizer = load_tokenizer("byte")
  specs = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
  batches = list(file_batches(specs, tokenizer, config, 3))
  assert all(b["tokens"].shape == (3, 32) for b in batches)
  counted = sum(
    tokenizer.count_bytes(b["targets"][b["loss_mask"]]) for b in batches
  )
  assert counted == len("first file " * 20 + "second")
  assert len(list(file_batches(specs, tokenizer, config, 1, 2))) == 2
  with pytest.raises(DataError, match="is not there"):
    list(file_batches([str(tmp_path / "c.txt")], tokenizer, config, 1))
  (tmp_path / "empty.txt").write_text("")
  with pytest.raises(DataError, match=r"no text in .*empty.txt"):
    list(file_batches([str(tmp_path / "empty.txt")], tokenizer, config, 1))


def test_files_with_invalid_utf8_are_told_of(tmp_path, caplog):
  (tmp_path / "bad.txt").write_bytes(b"one \xff two \xfe three")
  tokenizer, config = load_tokenizer("byte"), DataConfig(seq_len=32)
  assert list(file_batches([str(tmp_path / "bad.txt")], tokenizer, config, 1))
  assert "bad.txt: 2 invalid UTF-8 sequences replaced" in caplog.text


def test_reading_is_ready_before_threads_start(made):
  """TFDS deadlocks when two threads import it at once (Python 3.11)."""
  read_row = loader._ReadRow(made[1].stores[0], "train", 0)
  program = f"""
import pickle, sys
from moejax.data import loader
row = pickle.loads({pickle.dumps(read_row)!r})
before = set(sys.modules)
row(0)
assert set(sys.modules) == before, set(sys.modules) - before
"""
  subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
