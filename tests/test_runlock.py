# SPDX-License-Identifier: Apache-2.0
"""One run per workdir; stopping when asked."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from moejax import runlock
from moejax.errors import UserError
from moejax.runlock import PreemptionGuard, RunLock, RunLockError


def python(code: str, *args: str) -> subprocess.Popen:
  """Starts a process and waits until it has said that it is ready."""
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), *args],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True,
  )  # fmt: skip
  line = process.stdout.readline()
  assert line == "ready\n", process.communicate()
  return process


HOLDER = """
import sys
from moejax.runlock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
print("ready", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def holder(tmp_path):
  process = python(HOLDER, str(tmp_path))
  yield process
  process.kill()
  process.communicate()


def write_info(folder, **changes):
  info = {
    "host": runlock.socket.gethostname(),
    "pid": os.getppid(),
    "process_start": runlock.process_start(os.getppid()),
    "started": "2020-01-01T00:00:00+00:00",
    "token": "0",
  } | changes
  (folder / runlock.LOCK_FILE).write_text(json.dumps(info))


def test_second_run_is_refused_with_the_name_of_the_first(tmp_path, holder):
  with pytest.raises(RunLockError) as e:
    RunLock(tmp_path).acquire()
  text = str(e.value)
  assert str(tmp_path) in text and f"pid {holder.pid}" in text
  assert runlock.socket.gethostname() in text and "started 20" in text
  assert isinstance(e.value, UserError)


def test_a_killed_run_is_taken_over_with_a_message(tmp_path, holder, caplog):
  holder.kill()
  holder.wait()
  with caplog.at_level(logging.WARNING, "moejax"), RunLock(tmp_path):
    pass
  assert f"pid {holder.pid}" in caplog.text
  assert "taking over" in caplog.text and "that died" in caplog.text


def test_a_finished_run_leaves_no_message(tmp_path, holder, caplog):
  holder.communicate("", timeout=30)
  assert holder.returncode == 0
  for _ in range(2):
    with RunLock(tmp_path):
      pass
  assert caplog.text == ""


def test_two_locks_in_one_process(tmp_path):
  with RunLock(tmp_path) as lock:
    lock.acquire()  # again is once
    with pytest.raises(RunLockError, match=f"pid {os.getpid()}"):
      RunLock(tmp_path).acquire()
    RunLock(tmp_path, holder=False).acquire()
  with RunLock(tmp_path):
    pass


def test_release_leaves_the_record_of_a_successor(tmp_path):
  with RunLock(tmp_path):
    write_info(tmp_path)
  assert "2020-01-01" in (tmp_path / runlock.LOCK_FILE).read_text()


def test_a_recycled_pid_is_not_the_old_run(tmp_path, caplog):
  write_info(tmp_path, process_start="another boot 12345")
  with RunLock(tmp_path):
    assert "taking over" in caplog.text


def test_a_living_holder_is_respected_where_flock_does_not_work(tmp_path):
  # flock is free, as on a filesystem that only pretends.
  write_info(tmp_path)
  with pytest.raises(RunLockError, match=f"pid {os.getppid()}"):
    RunLock(tmp_path).acquire()


def test_without_flock_the_info_alone_decides(tmp_path, monkeypatch):
  def unsupported(fd, how):
    raise OSError(errno.EOPNOTSUPP, "not supported")

  monkeypatch.setattr(fcntl, "flock", unsupported)
  monkeypatch.setattr(runlock, "SETTLE", 0.1)
  with RunLock(tmp_path):
    write_info(tmp_path)  # as another run on this host would
    with pytest.raises(RunLockError, match="in use"):
      RunLock(tmp_path).acquire()
  write_info(tmp_path, process_start="gone")
  with RunLock(tmp_path):
    pass


def test_of_two_that_start_at_once_without_flock_the_last_one_wins(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(runlock, "_flock", lambda fd: None)
  monkeypatch.setattr(runlock, "SETTLE", 0.1)
  monkeypatch.setattr(
    runlock.time, "sleep", lambda seconds: write_info(tmp_path)
  )
  with pytest.raises(RunLockError, match=f"pid {os.getppid()}"):
    RunLock(tmp_path).acquire()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_host_is_watched(
  tmp_path, monkeypatch, caplog, alive
):
  monkeypatch.setattr(runlock, "PATIENCE", 60.0 if alive else 1.0)
  write_info(tmp_path, host="elsewhere", pid=1)
  stop = threading.Event()

  def beat():
    while not stop.wait(0.05):
      os.utime(tmp_path / runlock.LOCK_FILE)

  thread = threading.Thread(target=beat)
  try:
    if alive:
      thread.start()
      with pytest.raises(RunLockError, match="pid 1 on elsewhere"):
        RunLock(tmp_path).acquire()
    else:
      with RunLock(tmp_path):
        assert "taking over" in caplog.text
  finally:
    stop.set()
    if alive:
      thread.join()


def test_the_holder_touches_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(runlock, "HEARTBEAT", 0.02)
  with RunLock(tmp_path):
    first = os.stat(tmp_path / runlock.LOCK_FILE).st_mtime_ns
    end = time.monotonic() + 30
    while os.stat(tmp_path / runlock.LOCK_FILE).st_mtime_ns == first:
      assert time.monotonic() < end
      time.sleep(0.01)


FORKED = """
import os, sys, time
from moejax.runlock import RunLock
lock = RunLock(sys.argv[1])
lock.acquire()
if os.fork() == 0:
  print("ready", flush=True)  # the child: it has let go of the lock by now
  time.sleep(60)
  os._exit(0)
time.sleep(60)
"""


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
  process = python(FORKED, str(tmp_path))
  children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
  (child,) = map(int, children.read_text().split())
  process.kill()
  process.wait()
  try:
    with RunLock(tmp_path):
      pass
  finally:
    os.kill(child, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}', "\0" * 100])
def test_a_damaged_info_file_is_no_obstacle(tmp_path, text):
  (tmp_path / runlock.LOCK_FILE).write_text(text)
  with RunLock(tmp_path):
    pass


def test_a_workdir_that_cannot_be_made_is_one_clear_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(RunLockError, match="cannot write to the workdir"):
    RunLock(tmp_path / "file/run").acquire()


def test_a_read_only_workdir_is_one_clear_error(tmp_path):
  mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting needs root")
  try:
    with pytest.raises(RunLockError, match="Read-only file system"):
      RunLock(tmp_path).acquire()
  finally:
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_process_start_tells_pids_apart():
  own = runlock.process_start(os.getpid())
  assert own is not None and own == runlock.process_start(os.getpid())
  child = subprocess.Popen([sys.executable, "-c", "pass"])
  end = time.monotonic() + 30
  while runlock.process_start(child.pid) is not None:
    assert time.monotonic() < end, "a zombie counts as gone"
    time.sleep(0.01)
  child.wait()
  assert runlock.process_start(2**22 + 1) is None


def test_sigterm_is_a_request_and_twice_is_once(capfd):
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with PreemptionGuard() as guard:
    assert not guard.requested and not guard.should_stop(1)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert guard.requested and guard.should_stop(1)
  after = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  assert after == before
  assert capfd.readouterr().err.count("SIGTERM: saving") == 1


def test_ctrl_c_is_a_request_and_kills_nothing(capfd):
  with PreemptionGuard() as guard:
    os.kill(os.getpid(), signal.SIGINT)
    assert guard.requested
  assert "again stops at once" in capfd.readouterr().err


GUARDED = """
import time
from moejax.runlock import PreemptionGuard
with PreemptionGuard() as guard:
  print("ready", flush=True)
  while not guard.requested:
    time.sleep(0.01)
  print("saving", flush=True)
  time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_ends_the_process_at_once(first):
  process = python(GUARDED)
  process.send_signal(first)
  assert process.stdout.readline() == "saving\n"
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=20)
  assert process.returncode == runlock.EXIT_INTERRUPTED
  assert "stopping at once" in errors and "Traceback" not in errors


def test_off_the_main_thread_it_does_nothing_but_say_so(caplog):
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def body():
    with PreemptionGuard() as guard:
      seen.append((guard.requested, signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=body)
  thread.start()
  thread.join()
  assert seen == [(False, before)]
  assert "not on the main thread" in caplog.text


def test_exit_code_is_the_documented_one():
  assert os.EX_TEMPFAIL == runlock.EXIT_SAVED == 75


@pytest.mark.parametrize("what", ["removed", "moved", "made anew"])
def test_a_folder_that_is_not_there_any_more_is_not_held(tmp_path, what):
  folder = tmp_path / "run"
  with RunLock(folder) as lock:
    lock.require_held()
    if what == "moved":
      folder.rename(tmp_path / "elsewhere")
    else:
      shutil.rmtree(folder)
    if what == "made anew":
      folder.mkdir()
      (folder / runlock.LOCK_FILE).touch()
    with pytest.raises(RunLockError, match="run.lock, was removed, moved"):
      lock.require_held()


def test_a_folder_behind_a_link_is_held(tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "link").symlink_to("run")
  with RunLock(tmp_path / "link") as lock:
    lock.require_held()
  RunLock(tmp_path, holder=False).require_held()  # another process has it
