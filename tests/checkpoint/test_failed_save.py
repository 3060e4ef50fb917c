# SPDX-License-Identifier: Apache-2.0
"""A save that fails leaves the last good step, no trace, and a clear error."""

import contextlib
import os
import re
import resource
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from moejax.checkpoint import (
  Checkpointer,
  CheckpointReader,
  arrays,
  layout,
  shares,
  state_digest,
)
from moejax.errors import CheckpointError, StuckError
from moejax.runlock import RunLockError

MB = 1 << 20


def state_of(step: int, megabytes: float):
  return {"w": jnp.full(int(megabytes * MB) // 4, step, jnp.float32)}


def abstract(megabytes: float):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    state_of(0, megabytes),
  )


@contextlib.contextmanager
def file_size_limit(size: int):
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def error_of_next_check(ckpt) -> str:
  end = time.monotonic() + 60
  while time.monotonic() < end:
    try:
      ckpt.check()
    except CheckpointError as e:
      return str(e)
    time.sleep(0.01)
  raise AssertionError("the failed save was never reported")


def save_and_wait(ckpt, step: int):
  ckpt.save(step, state_of(step, 0.1), {})
  ckpt.wait()


def test_full_disk(small_disk):
  folder = small_disk / "checkpoints"
  with Checkpointer(folder, keep_last=2) as ckpt:
    ckpt.save(1, state_of(1, 1.0), {"step": 1})
    ckpt.wait()
    ckpt.save(2, state_of(2, 20.0), {})
    message = error_of_next_check(ckpt)
    assert "saving step 2" in message and "No space left" in message
    assert "it needs about 21.0 MB" in message
    # What the failed save itself took is free again.
    (free,) = re.findall(r"([\d.]+) MB are free on its disk", message)
    assert 2 < float(free) < 4.2
    ckpt.check()  # told once
    assert ckpt.latest() == 1 and os.listdir(folder) == ["1"]
    restored = ckpt.restore(abstract(1.0))
    assert state_digest(restored.state) == state_digest(state_of(1, 1.0))
    ckpt.save(2, state_of(2, 1.0), {"step": 2})
  assert CheckpointReader(folder).restore(abstract(1.0)).meta == {"step": 2}


def test_file_size_limit_and_report_by_the_next_save(tmp_path):
  with Checkpointer(tmp_path, keep_last=2) as ckpt:
    ckpt.save(1, state_of(1, 0.2), {})
    ckpt.wait()
    with file_size_limit(MB):
      ckpt.save(2, state_of(2, 3.0), {})
      with pytest.raises(CheckpointError, match=r"saving step 2 .* failed"):
        ckpt.save(3, state_of(3, 0.2), {})
    assert ckpt.latest() == 1 and os.listdir(tmp_path) == ["1"]
    ckpt.save(3, state_of(3, 3.0), {})
  assert CheckpointReader(tmp_path).steps() == [1, 3]


@pytest.mark.parametrize("where", ["begin", "commit"])
def test_failure_around_the_arrays(tmp_path, monkeypatch, where):
  """No room for the small files, when the arrays had it."""
  from moejax.checkpoint import layout

  def full(*args):
    raise OSError(28, "No space left on device")

  with Checkpointer(tmp_path, keep_last=2) as ckpt:
    ckpt.save(1, state_of(1, 0.1), {})
    ckpt.wait()
    with monkeypatch.context() as m:
      m.setattr(layout, where, full)
      with pytest.raises(CheckpointError, match="No space left"):
        save_and_wait(ckpt, 2)
    assert os.listdir(tmp_path) == ["1"]
    ckpt.save(2, state_of(2, 0.1), {})
  assert CheckpointReader(tmp_path).steps() == [1, 2]


def test_workdir_deleted_under_the_run(tmp_path):
  folder = tmp_path / "checkpoints"
  with Checkpointer(folder, keep_last=2) as ckpt:
    ckpt.save(1, state_of(1, 0.1), {})
    ckpt.wait()
    os.rename(folder, tmp_path / "gone")
    assert ckpt.latest() is None
    ckpt.save(2, state_of(2, 0.1), {})
  # Made anew, and whole.
  assert CheckpointReader(folder).steps() == [2]


@pytest.mark.parametrize(
  "place, name",
  [(layout, "begin"), (arrays.Saving, "__init__"), (arrays.Saving, "finish")],
)
def test_a_save_that_hangs_is_given_up(tmp_path, monkeypatch, place, name):
  """By the next save or by `check`; it is not waited for again on leaving."""
  with Checkpointer(tmp_path, keep_last=2) as ckpt:
    save_and_wait(ckpt, 1)
  end = threading.Event()
  monkeypatch.setattr(place, name, lambda *_: end.wait() and None)
  for notice in (save_and_wait, check_until_told):
    began = time.monotonic()
    message = r"step 2 .*not ended after 1 s"
    with pytest.raises(StuckError, match=message):
      save_slowly(tmp_path / notice.__name__, notice)
    assert 1 <= time.monotonic() - began < 30
  end.set()


def test_nothing_is_written_after_a_save_has_failed(tmp_path, monkeypatch):
  """By the threads of other items, which Orbax does not wait for."""
  import orbax.checkpoint as ocp

  Late = type("Late", (threading.Thread,), {"__module__": "orbax.late"})
  stray = tmp_path / "1" / "late"

  def write():
    time.sleep(0.5)
    stray.parent.mkdir(exist_ok=True)
    stray.touch()

  late = Late(target=write)

  def fail(self):
    if late.ident is None:  # closing calls it once more
      late.start()
      raise OSError("one item failed")

  monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", fail)
  with pytest.raises(CheckpointError, match="one item failed"):
    save_slowly(tmp_path, save_and_wait, step=1, timeout=60)
  time.sleep(0.7)
  assert not stray.exists()


def save_slowly(folder, notice, step=2, timeout=1):
  with Checkpointer(folder, keep_last=2, timeout=timeout) as ckpt:
    ckpt.save(step, state_of(step, 0.1), {})
    notice(ckpt, step + 1)


def check_until_told(ckpt, _):
  while True:
    ckpt.check()
    time.sleep(0.01)


def fail_while_saving(folder):
  with Checkpointer(folder, keep_last=2) as ckpt:
    ckpt.save(1, state_of(1, 3.0), {})
    raise ZeroDivisionError


def test_leaving_the_context_reports_a_failure(tmp_path, caplog):
  with file_size_limit(MB):
    with pytest.raises(CheckpointError, match="saving step 1"):
      with Checkpointer(tmp_path, keep_last=2) as ckpt:
        ckpt.save(1, state_of(1, 3.0), {})
    # An error on its way is not hidden by it.
    with pytest.raises(ZeroDivisionError):
      fail_while_saving(tmp_path)
  assert "saving step 1" in caplog.text


def test_an_old_step_that_cannot_be_deleted_is_a_warning(
  tmp_path, monkeypatch, caplog
):
  from moejax.checkpoint import layout

  def fail(folder):
    raise PermissionError(1, "Operation not permitted")

  monkeypatch.setattr(layout, "delete", fail)
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, state_of(1, 0.1), {})
    ckpt.save(2, state_of(2, 0.1), {})
  assert "could not delete an old checkpoint" in caplog.text
  assert CheckpointReader(tmp_path).latest() == 2


def test_everything_is_on_the_disk_before_the_step_exists(
  tmp_path, monkeypatch
):
  from moejax.checkpoint import files

  synced, at_commit = set(), []
  fsync, rename = os.fsync, files.rename

  def record_fsync(fd):
    synced.add(os.readlink(f"/proc/self/fd/{fd}"))
    fsync(fd)

  def record_rename(source, target):
    at_commit.append(set(synced))
    rename(source, target)

  monkeypatch.setattr(os, "fsync", record_fsync)
  monkeypatch.setattr(files, "rename", record_rename)
  with Checkpointer(tmp_path, keep_last=1) as ckpt:
    ckpt.save(1, state_of(1, 0.1), {})
  (before_commit,) = at_commit
  for path in (tmp_path / "1").rglob("*"):
    if path.name != "manifest.json":
      assert str(path) in before_commit
  assert str(tmp_path / "1/manifest.json.tmp") in before_commit
  assert str(tmp_path) in synced and str(tmp_path / "1") in synced


@pytest.mark.parametrize("hook", ["before_begin", "before_commit", "neither"])
def test_a_run_that_lost_its_place_removes_nothing(tmp_path, hook, monkeypatch):
  """What lies there may be of the run that has taken the place over."""
  theirs = tmp_path / "2" / "theirs"

  def held():
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("x")
    raise RunLockError("another run has it")

  def gone(_):
    """The files that were written, removed by the other run."""
    hooks["before_begin"] = held
    raise FileNotFoundError("another run has it: its files are gone")

  ckpt = Checkpointer(tmp_path, keep_last=5)
  save_and_wait(ckpt, 1)
  ckpt.close()
  hooks = {"before_begin": lambda: None, "before_commit": lambda: None}
  hooks |= {hook: held} if hook in hooks else {}
  if hook == "neither":
    monkeypatch.setattr(shares, "digest", gone)
  ckpt = Checkpointer(
    tmp_path, keep_last=5, before_begin=lambda: hooks["before_begin"](),
    before_commit=hooks["before_commit"],
  )  # fmt: skip
  with pytest.raises(CheckpointError, match="another run has it"):
    save_and_wait(ckpt, 2)
  assert theirs.read_text() == "x"
  assert CheckpointReader(tmp_path).latest() == 1
