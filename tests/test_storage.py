# SPDX-License-Identifier: Apache-2.0
"""What is an address, what is tried again, and the lock that is an object."""

import json
import logging
import pathlib

import pytest

from moejax import objectlock, storage
from moejax.errors import UserError
from moejax.objectlock import ObjectLock
from moejax.run_files import RunFiles
from moejax.runlock import RunLockError
from tests import object_store

RUN = f"gs://{object_store.BUCKET}/locked"


@pytest.fixture(scope="module")
def bucket():
  object_store.require("gcsfs", object_store.EMULATOR)
  with object_store.Bucket() as made, pytest.MonkeyPatch.context() as patch:
    for name, value in made.environment().items():
      patch.setenv(name, value)
    yield made


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(storage, "PATIENCE", 0.5)
  monkeypatch.setattr(storage, "FIRST_DELAY", 0.01)
  monkeypatch.setattr(objectlock, "PATIENCE", 1.0)
  monkeypatch.setattr(objectlock, "SETTLE", 0.05)


@pytest.mark.parametrize(
  "path, want",
  [
    ("gs://bucket/run/", "gs://bucket/run"),
    (pathlib.Path("gs://bucket/a/b"), "gs://bucket/a/b"),
    ("s3://bucket", "s3://bucket"),
    ("runs/tiny", None),
    ("gs:", None),
    ("/a/gs://b", None),
  ],
)
def test_addresses(path, want):
  assert storage.address(path) == want


class Answers:
  """A function that raises what it is told, in turn, then returns 7."""

  def __init__(self, *errors):
    self.errors, self.calls = list(errors), 0

  def __call__(self, path):
    self.calls += 1
    if self.errors:
      raise self.errors.pop(0)
    return 7


def with_status(code):
  error = OSError("refused")
  error.code = code
  return error


def call(answers):
  @storage.retried
  def read(path):
    return answers(path)

  return read("gs://b/x")


def test_what_passes_is_tried_again_and_said_once(quick, caplog, monkeypatch):
  monkeypatch.setattr(storage, "PATIENCE", 60.0)
  answers = Answers(TimeoutError(), with_status(503), with_status("429"))
  with caplog.at_level(logging.WARNING):
    assert call(answers) == 7
  assert answers.calls == 4
  assert caplog.text.count("trying again") == 1 and "gs://b/x" in caplog.text


@pytest.mark.parametrize(
  "error, raised",
  [
    (FileNotFoundError("gs://b/x"), FileNotFoundError),
    (FileExistsError("gs://b/x"), FileExistsError),
    (with_status(403), storage.StorageError),
    (OSError("Forbidden: x"), storage.StorageError),
  ],
)
def test_what_does_not_pass_is_not(quick, error, raised):
  answers = Answers(error)
  with pytest.raises(raised, match="gs://b/x"):
    call(answers)
  assert answers.calls == 1


def test_a_mistake_of_ours_is_not_the_stores(quick):
  with pytest.raises(ZeroDivisionError):
    call(Answers(ZeroDivisionError()))


def test_patience_ends_in_one_line(quick, monkeypatch):
  monkeypatch.setattr(storage, "PATIENCE", 2.0)
  answers = Answers(*(with_status(503) for _ in range(99)))
  with pytest.raises(UserError, match="gs://b/x: HTTP 503: refused"):
    call(answers)
  assert 1 < answers.calls < 99


def test_one_holder_at_a_time(bucket, quick):
  first, second = ObjectLock(RUN), ObjectLock(RUN)
  with first:
    with pytest.raises(RunLockError, match="in use by the run with pid"):
      second.acquire()
    first.require_held()
  with second:
    second.require_held()
  assert storage.names(RUN) == []


def test_a_dead_holder_elsewhere_is_taken_over(bucket, quick, monkeypatch):
  dead = ObjectLock(RUN)
  monkeypatch.setattr(objectlock, "_machine", lambda: "elsewhere")
  dead.acquire()
  monkeypatch.setattr(objectlock, "_machine", lambda: "here")
  with ObjectLock(RUN):
    # It only was cut off: before its next checkpoint it finds out.
    with pytest.raises(RunLockError, match="is in use"):
      dead.require_held()
    dead.release()
    assert storage.names(RUN) == ["run.lock"]


def test_a_living_holder_elsewhere_is_not(bucket, quick, monkeypatch):
  monkeypatch.setattr(objectlock, "BEAT", 0.2)
  monkeypatch.setattr(objectlock, "PATIENCE", 60.0)
  monkeypatch.setattr(objectlock, "_machine", lambda: "elsewhere")
  with ObjectLock(RUN):
    monkeypatch.setattr(objectlock, "_machine", lambda: "here")
    with pytest.raises(RunLockError, match="in use"):
      ObjectLock(RUN).acquire()


def test_files_are_sent_when_they_change_and_fetched_anew(
  bucket, quick, tmp_path, monkeypatch
):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  run = f"{RUN}/files"
  with RunFiles(run) as files:
    (files.folder / "report").mkdir()
    for name in ("metrics.jsonl", "report/index.html", "x.partial"):
      (files.folder / name).write_text("one")
    files.send()
    served = bucket.served
    files.send()
    assert bucket.served - served <= 2  # a look at the lock
    (files.folder / "metrics.jsonl").write_text("two\n")
    storage.write(f"{run}/run.lock", json.dumps({"a": 1}).encode())
    with pytest.raises(RunLockError, match="not a lock of moejax"):
      files.send()
    storage.remove(f"{run}/run.lock")
  assert storage.read(f"{run}/metrics.jsonl") == b"one"
  assert storage.sizes(run) == {"metrics.jsonl": 3, "report/index.html": 3}
  with RunFiles(run) as files:
    assert [p.name for p in files.folder.iterdir()] == ["metrics.jsonl"]
    assert (files.folder / "metrics.jsonl").read_text() == "one"
