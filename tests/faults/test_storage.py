# SPDX-License-Identifier: Apache-2.0
"""Runs and token stores at an address, and what may go wrong with the store."""

import json
import os
import subprocess
import time

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
  run = at("runs/unbroken")
  done = subprocess.run(
    command("train", "--config=config.py", f"--workdir={run}", page=True),
    cwd=place, env=environment(), capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "moejax" not in done.stderr
  return at("runs/unbroken")


def test_a_run_at_an_address_is_as_one_in_a_folder(place, stored, unbroken):
  assert_same_run(stored, unbroken)
  names = storage.names(stored)
  assert {"config.json", "tokenizer.json", "events", "report"} <= {*names}
  assert "run.lock" not in names
  assert not (place / "gs:").exists()


def test_killed_and_gone_on_elsewhere(bucket, place, unbroken, another_host):
  run = at("runs/killed")
  process = subprocess.Popen(
    command("train", "--config=config.py", f"--workdir={run}"),
    cwd=place, env=environment(), stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )  # fmt: skip
  reader, limit = CheckpointReader(f"{run}/checkpoints"), time.monotonic() + 200
  while (reader.latest() or 0) < 10 and time.monotonic() < limit:
    time.sleep(0.05)
  process.kill()
  process.wait()
  assert "run.lock" in storage.names(run)
  saved = CheckpointReader(f"{run}/checkpoints").latest()
  assert 10 <= saved < 40
  # Each line that the checkpoint promises was there before it.
  assert len(logged(run, "metrics").splitlines()) >= saved
  another_host()
  done = train(place, run)
  assert done.returncode == 0, done.stderr
  assert f"goes on at step {saved}" in done.stdout
  assert "from a run that died" in done.stderr
  assert_same_run(run, unbroken)
  # The first start's launch too, which only the store remembers.
  assert logged(run, "launches").count(b"setup") == 2


def test_sigterm_saves_there(bucket, place, unbroken):
  run = at("runs/stopped")
  done = train(place, run, *faulty.option(7, "signal", "SIGTERM"))
  assert done.returncode == 75, done.stderr
  assert CheckpointReader(f"{run}/checkpoints").latest() == 7
  assert len(logged(run, "metrics").splitlines()) == 7
  assert train(place, run).returncode == 0
  assert_same_run(run, unbroken)


def copy(source, target):
  for name in storage.sizes(source):
    storage.write(f"{target}/{name}", storage.read(f"{source}/{name}"))
  return target


def test_a_damaged_object_is_passed_over(place, stored, unbroken, another_host):
  run = copy(stored, at("runs/damaged"))
  folder = f"{run}/checkpoints/40/arrays"
  sizes = storage.sizes(folder)
  name = max(sizes, key=sizes.get)
  data = bytearray(storage.read(f"{folder}/{name}"))
  data[len(data) // 2] ^= 4
  storage.write(f"{folder}/{name}", bytes(data))
  another_host()
  done = train(place, run)
  assert done.returncode == 0, done.stderr
  assert name in done.stderr and "goes on at step 35" in done.stdout
  assert_same_run(run, unbroken)


def test_a_second_run_is_refused(bucket, place):
  run = at("runs/taken")
  words = f"train --config=config.py --workdir={run}"
  done = train(place, run, "--config.train.num_steps=10",
               "--config.optimizer.schedule.decay=0",
               *faulty.option(7, "start_again", words))  # fmt: skip
  assert done.returncode == 0, done.stderr
  second = json.loads((place / "second.json").read_text())
  assert second["status"] == 2
  assert f"{run} is in use by the run with pid" in second["error"]
  assert "run.lock" not in storage.names(run)


@pytest.mark.parametrize("status", [429, 503])
def test_what_passes_is_tried_again(bucket, place, unbroken, status):
  run = at(f"runs/busy_{status}")
  bucket.refuse(f"busy_{status}", status, times=8, every=29)
  done = train(place, run)
  assert bucket.refused == 8
  assert done.returncode == 0, done.stderr
  assert_same_run(run, unbroken)


@pytest.mark.slow
def test_commands_take_the_address(place, stored, unbroken, another_host):
  another_host()
  for words, told in (
    (("eval", "--json"), "xent"),
    (("generate", "--prompt=the ", "--max-tokens=4"), "the "),
    (("report",), "index.html"),
    (("replay", "--step=3"), "step 3"),
    (("analyze", "--data=text/1*.txt"), "index.html"),
  ):
    name, *options = words
    done = moejax(place, name, stored, *options)
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    here = moejax(place, name, unbroken, *options)
    if name in ("eval", "replay"):
      assert done.stdout == here.stdout
  assert "index.html" in storage.names(f"{stored}/analysis")
  done = train(place, "branch", f"--config.train.branch_from={stored}:35")
  assert done.returncode == 0, done.stderr
  assert "a branch of gs://" in done.stdout
  assert digest(place / "branch") == digest(unbroken)
  assert not (place / "gs:").exists()


def test_a_token_store_at_an_address(place, stored, another_host):
  name = at("tokens")
  option = f"--config.data.store={name}"
  none = train(place, "from_store", option)
  assert none.returncode == 2 and "no token store" in none.stderr
  made = moejax(place, "data", "prepare", "--config=config.py", option)
  assert made.returncode == 0, made.stderr
  (folder,) = storage.names(name)
  there = storage.names(f"{name}/{folder}")
  assert "manifest.json" in there and "verified.json" not in there
  assert "manifest.json.tmp" not in there
  another_host()
  again = moejax(place, "data", "prepare", "--config=config.py", option)
  assert "ready" in again.stdout and "copying gs://" in again.stdout
  done = train(place, "from_store", option)
  assert done.returncode == 0, done.stderr
  assert digest(place / "from_store") == digest(stored)


def test_a_damaged_token_store_at_an_address(place, bucket, another_host):
  name = at("damaged_tokens")
  option = f"--config.data.store={name}"
  prepare = ("data", "prepare", "--config=config.py", option)
  assert moejax(place, *prepare).returncode == 0
  (folder,) = storage.names(name)
  shards = [n for n in storage.names(f"{name}/{folder}") if "train" in n]
  path = f"{name}/{folder}/{shards[0]}"
  whole = storage.read(path)
  storage.write(path, whole[:-1] + bytes([whole[-1] ^ 1]))
  another_host()
  done = train(place, "never", option)
  assert done.returncode == 2
  assert f"{path} is damaged" in done.stderr.splitlines()[-1]
  assert "--rebuild" in done.stderr
  assert moejax(place, *prepare, "--rebuild").returncode == 0
  assert storage.read(path) == whole
  storage.remove(path)
  os.environ["XDG_CACHE_HOME"] += "_third"
  done = train(place, "never", option)
  assert done.returncode == 2 and f"{path} is missing" in done.stderr


@pytest.mark.parametrize(
  "words, told",
  [
    (("train", "--config=config.py", "--workdir=gs://no-such-bucket/run"),
     "no-such-bucket"),
    (("train", "--config=config.py", "--workdir=s3://bucket/run"), "s3://"),
    (("train", "--config=config.py", "--workdir=ftp://host/run"),
     "known are gs://, s3://"),
    (("eval", "gs://moejax-test/runs/nothing"), "not the folder of a run"),
    (("eval", "gs://no-such-bucket/run"), "not the folder of a run"),
    (("convert", "to-hf", "run", "gs://moejax-test/hub"), "the export"),
    (("sweep", "--sweep=x.py", "--workdir=gs://moejax-test/s"),
     "--workdir of a sweep"),
  ],
  ids=lambda words: " ".join(words[:3]) if isinstance(words, tuple) else "",
)  # fmt: skip
def test_what_cannot_be_is_one_line(bucket, place, words, told):
  done = moejax(place, *words)
  assert done.returncode == 2, done.stderr
  assert told in done.stderr.splitlines()[-1]
  assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_store_that_is_gone_is_one_line(bucket, place, monkeypatch):
  for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
  done = train(place, at("runs/nowhere"))
  assert done.returncode == 2
  assert "trying again" in done.stderr
  assert at("runs/nowhere") in done.stderr.splitlines()[-1]
  assert "Traceback" not in done.stderr
