# SPDX-License-Identifier: Apache-2.0
"""Opening a store: everything that does not fit is named."""

import dataclasses
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from moejax.data import (
  load_tokenizer,
  open_stores,
  sources,
  train_tokenizer,
)
from moejax.data.manifest import read_manifest
from moejax.data.store import TokenStore, store_path
from moejax.errors import DataError, UserError
from tests.data.corpora import make_stores


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return make_stores(tmp_path_factory.mktemp("store"), (300,))


@pytest.fixture
def folder(made, tmp_path):
  """A copy of the store to damage."""
  copy = tmp_path / "copy"
  shutil.copytree(made[1].stores[0].folder, copy)
  return copy


def flip(path, at, keep_time=False):
  before = path.stat()
  data = bytearray(path.read_bytes())
  data[at] ^= 4
  path.write_bytes(data)
  if keep_time:
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_manifest_tells_what_the_store_is(made):
  config, stores = made
  manifest = stores.stores[0].manifest
  assert manifest["tokenizer"] == load_tokenizer("byte").digest
  assert manifest["seq_len"] == config.seq_len
  assert manifest["splits"]["train"]["rows"] == stores.rows("train")
  assert manifest["splits"]["validation"]["rows"] == stores.rows("validation")
  assert 0.97 < manifest["splits"]["train"]["fill"] <= 1


def test_a_flipped_bit_is_found_on_opening(folder):
  rng = np.random.default_rng(0)
  shards = sorted(folder.glob("token_store-*"))
  for shard in shards:
    original = shard.read_bytes()
    for at in rng.integers(0, len(original), 5):
      flip(shard, at)
      with pytest.raises(DataError, match=f"{shard.name} is damaged"):
        TokenStore.open(folder, load_tokenizer("byte"))
      shard.write_bytes(original)
  TokenStore.open(folder, load_tokenizer("byte"))


def test_a_bit_that_flips_after_the_check_is_found_on_reading(folder):
  TokenStore.open(folder, load_tokenizer("byte"))
  shard = next(folder.glob("token_store-train*"))
  flip(shard, 70_000, keep_time=True)
  store = TokenStore.open(folder, load_tokenizer("byte"))
  with pytest.raises(DataError, match=rf"{shard.name}: row \d+ is unreadable"):
    [store.read("train", row) for row in range(store.rows("train"))]


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_truncated_and_missing_shards_are_named(folder, damage):
  shard = next(folder.glob("token_store-train*"))
  TokenStore.open(folder, load_tokenizer("byte"))  # sizes are checked always
  if damage == "truncate":
    shard.write_bytes(shard.read_bytes()[:-100])
    message = f"{shard.name} has \\d+ bytes instead of \\d+"
  else:
    shard.unlink()
    message = f"{shard.name}: No such file"
  with pytest.raises(DataError, match=message):
    TokenStore.open(folder, load_tokenizer("byte"))


def test_digests_are_computed_once_for_each_copy(folder, monkeypatch):
  read = []
  digest = sources.file_digest
  monkeypatch.setattr(
    sources, "file_digest", lambda path: read.append(path) or digest(path)
  )
  shards = len(list(folder.glob("token_store-*")))
  for _ in range(3):
    TokenStore.open(folder, load_tokenizer("byte"))
  assert len(read) == shards
  (folder / "verified.json").write_text("not JSON")
  TokenStore.open(folder, load_tokenizer("byte"))
  assert len(read) == 2 * shards


def test_another_tokenizer_is_refused_by_both_names(folder, tmp_path):
  texts = ["some text to train on " * 20] * 20
  other = train_tokenizer(texts, 300, tmp_path / "bpe")
  mine, others = load_tokenizer("byte").digest[:12], other.digest[:12]
  with pytest.raises(DataError, match=f"{mine} there, {others} here"):
    TokenStore.open(folder, other)


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}', None])
def test_a_damaged_manifest_is_named(folder, text):
  if text is None:
    (folder / "manifest.json").unlink()
  else:
    (folder / "manifest.json").write_text(text)
  with pytest.raises(DataError, match=r"manifest.json|format 0"):
    TokenStore.open(folder, load_tokenizer("byte"))


def test_a_missing_store_tells_the_command_and_what_there_is(made):
  config, stores = made
  other = dataclasses.replace(config, seq_len=64)
  with pytest.raises(DataError) as caught:
    open_stores(other, load_tokenizer("byte"))
  message = str(caught.value)
  assert "no token store for " in message and "seq_len=64" in message
  assert "moejax data prepare with the same --config" in message
  assert stores.stores[0].folder.name in message
  other = dataclasses.replace(config, sources=("python-stdlib",))
  with pytest.raises(DataError, match="no token store for python-stdlib"):
    open_stores(other, load_tokenizer("byte"))


def test_an_address_of_no_known_store_is_refused(made):
  config = dataclasses.replace(made[0], store="ftp://host/stores")
  with pytest.raises(UserError, match="known are gs://, s3://"):
    open_stores(config, load_tokenizer("byte"))


def test_rows_of_another_length_are_refused(made, tmp_path):
  config, stores = made
  folder = stores.stores[0].folder
  moved = dataclasses.replace(config, store=str(tmp_path), seq_len=48)
  (spec,) = config.sources
  shutil.copytree(folder, store_path(moved, spec, load_tokenizer("byte")))
  with pytest.raises(DataError, match=r"rows of 32 tokens, data.seq_len is 48"):
    open_stores(moved, load_tokenizer("byte"))


def test_a_store_goes_to_other_processes(made):
  store = made[1].stores[0]
  copy = pickle.loads(pickle.dumps(store))
  for row in range(5):
    there, here = copy.read("train", row), store.read("train", row)
    assert np.array_equal(there.tokens, here.tokens)


def test_the_fingerprint_follows_the_rows(made, folder):
  store = made[1].stores[0]
  manifest = json.loads((folder / "manifest.json").read_text())
  copy = TokenStore(folder, manifest)
  assert copy.fingerprint == store.fingerprint
  # Another compression of the same rows is the same data.
  manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
  assert TokenStore(folder, manifest).fingerprint == store.fingerprint
  manifest["splits"]["train"]["shards"][0]["rows_sha256"] = "0" * 64
  assert TokenStore(folder, manifest).fingerprint != store.fingerprint


def test_large_vocabularies_get_wide_tokens(tmp_path, monkeypatch):
  monkeypatch.setattr(
    "moejax.data.tokenizer.ByteTokenizer.vocab_size", (1 << 16) + 1
  )
  _, stores = make_stores(tmp_path, (50,))
  row = stores.stores[0].read("train", 0)
  assert row.tokens.dtype == np.uint32
  assert row.tokens.max() < 259
  manifest = read_manifest(stores.stores[0].folder)
  assert manifest["dtype"] == "<u4"
