# SPDX-License-Identifier: Apache-2.0
"""Runs and token stores at an address, and what may go wrong with the store."""

import json
import os
import signal
import subprocess

import pytest

from moejax import storage
from moejax.checkpoint import CheckpointReader
from tests import object_store
from tests.faults import faulty
from tests.small_run import command, environment, moejax
from tests.test_train import digest, train

LOGS = ("metrics", "eval", "router_load", "samples")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
  object_store.require("gcsfs", object_store.EMULATOR)
  with object_store.Bucket() as made, pytest.MonkeyPatch.context() as patch:
    for name, value in made.environment().items():
      patch.setenv(name, value)
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield made


@pytest.fixture
def another_host(tmp_path, monkeypatch):
  """Nothing of what ran before is in its cache."""
  return lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))


@pytest.fixture(autouse=True)
def no_faults_left(bucket):
  yield
  bucket.faults = []


def at(name):
  return f"gs://{object_store.BUCKET}/{name}"


def logged(address, name):
  return storage.read(f"{address}/{name}.jsonl")


def assert_same_run(address, unbroken):
  assert digest(address) == digest(unbroken)
  for name in LOGS:
    want = (unbroken / f"{name}.jsonl").read_bytes()
    assert logged(address, name) == want, name


@pytest.fixture(scope="module")
def stored(bucket, place):
  """A run that nothing happened to, at an address."""
  done = train(place, at("runs/unbroken"))
  assert done.returncode == 0, done.stderr
  assert "moejax" not in done.stderr
  return at("runs/unbroken")


def test_a_run_at_an_address_is_as_one_in_a_folder(place, stored, unbroken):
  assert_same_run(stored, unbroken)
  names = storage.names(stored)
  assert {"config.json", "tokenizer.json", "events", "report"} <= {*names}
  assert "run.lock" not in names
  assert not (place / "gs:").exists()
