# SPDX-License-Identifier: Apache-2.0
"""One run per workdir, and stopping it politely.

`RunLock` rests on flock where the filesystem has it, which ends with the
process however that dies. The file's contents say who holds it; a running
holder touches the file every few seconds, which is what tells a dead run on
another host from a living one.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
from typing import Any, Self

from moejax import storage
from moejax.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
HEARTBEAT = 5.0  # seconds between touches of the file
# Seconds without a touch after which a holder on another host counts as dead.
PATIENCE = 20.0
SETTLE = 1.0  # seconds for runs that start at once to see each other

# Exit codes of a run that was asked to stop.
EXIT_SAVED = 75  # EX_TEMPFAIL: state is saved, run the same command again
EXIT_INTERRUPTED = 130  # second Ctrl-C: nothing was saved, nothing is damaged


class RunLockError(UserError):
  """The workdir is in use by another run, or cannot be written."""


class RunLock:
  """Holds a workdir for one run; a context manager.

  Of several processes of one run only the first holds the lock: the others
  pass `holder=False` and do nothing.
  """

  def __init__(self, workdir: str | os.PathLike, holder: bool = True):
    """Args: workdir: folder, made if missing; `objectlock` has addresses.

    Nothing happens before `acquire`.
    """
    self.workdir = os.fspath(workdir)
    self.path = os.path.join(self.workdir, LOCK_FILE)
    self._holder = holder
    self._fd: int | None = None
    self._token = uuid.uuid4().hex
    self._stop = threading.Event()
    self._heartbeat: threading.Thread | None = None

  def acquire(self) -> None:
    """Takes the lock, also from a run that has died.

    Raises:
      RunLockError: another run holds it (says host, pid and start time), or
        the workdir cannot be written.
    """
    if not self._holder or self._fd is not None:
      return
    storage.require_folder(self.workdir, "what this command writes")
    try:
      os.makedirs(self.workdir, exist_ok=True)
      fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
      raise _unwritable(self.workdir, e) from e
    try:
      self._take(fd)
    except OSError as e:
      os.close(fd)
      raise _unwritable(self.workdir, e) from e
    except BaseException:
      os.close(fd)
      raise
    self._fd = fd
    _open_locks.add(self)
    self._stop.clear()
    self._heartbeat = threading.Thread(
      target=self._beat, args=(fd,), name="moejax-lock", daemon=True
    )
    self._heartbeat.start()

  def release(self) -> None:
    """Gives the lock back; twice is once."""
    if self._fd is None:
      return
    self._stop.set()
    if self._heartbeat is not None:
      self._heartbeat.join()
    fd, self._fd = self._fd, None
    _open_locks.discard(self)
    with contextlib.suppress(OSError):  # a lost disk
      holder = _read(fd)
      if holder is not None and holder["token"] == self._token:
        os.ftruncate(fd, 0)
    os.close(fd)

  def require_held(self) -> None:
    """Makes sure that the folder still is the one that was locked.

    What flock has given, nobody takes away.

    Raises:
      RunLockError: it was removed, moved or replaced.
    """
    if self._fd is None:
      return
    with contextlib.suppress(OSError):  # a disk that says nothing now
      held = os.fstat(self._fd)
      if not _is_at(self.path, held):
        raise RunLockError(
          f"{self.workdir}, or its {LOCK_FILE}, was removed, moved or replaced "
          "while its run goes on, and may be another's now; the same command "
          "goes on from what is there"
        )

  def __enter__(self) -> Self:
    self.acquire()
    return self

  def __exit__(self, *exc_info) -> None:
    self.release()

  def _take(self, fd: int) -> None:
    locked = _flock(fd)
    if locked is False:
      raise RunLockError(in_use(self.workdir, _read(fd)))
    previous = _read(fd)
    if previous is not None:
      self._supersede(fd, previous, locked)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    info = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "process_start": process_start(os.getpid()),
      "started": now,
      "token": self._token,
    }
    text = json.dumps(info, indent=1) + "\n"
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)
    os.fsync(fd)
    if locked is None:
      # Without flock two runs that start at once may both get here.
      time.sleep(SETTLE)
      written = _read(fd)
      if written is None or written["token"] != self._token:
        raise RunLockError(in_use(self.workdir, written))

  def _supersede(self, fd: int, previous: dict, locked: bool | None) -> None:
    """Makes sure that the holder on record is dead.

    Raises:
      RunLockError: it lives.
    """
    own_host = previous["host"] == socket.gethostname()
    if own_host:
      alive = previous["pid"] != os.getpid() and (
        process_start(previous["pid"]) == previous["process_start"]
      )
      # After a reboot, or in a container, a pid may be taken by another.
      alive = alive and previous["process_start"] is not None
    else:
      # The lock may be one of this host only (some cluster filesystems).
      say_watching(self.workdir, previous, PATIENCE)
      alive = _is_touched(fd, PATIENCE)
    take_over(self.workdir, previous, alive)

  def _beat(self, fd: int) -> None:
    while not self._stop.wait(HEARTBEAT):
      with contextlib.suppress(OSError):
        os.utime(fd)


# Locks of this process, for children that fork without exec: a copy of the
# descriptor in a data worker that outlives a killed run would keep the lock.
_open_locks: set[RunLock] = set()


def _is_at(path: str, held: os.stat_result) -> bool:
  try:
    return os.path.samestat(os.stat(path), held)
  except FileNotFoundError:
    return False


def _close_in_child() -> None:
  for lock in _open_locks:
    if lock._fd is not None:
      os.close(lock._fd)
      lock._fd = None
  _open_locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


def process_start(pid: int) -> str | None:
  """When a process of this host started, as text that tells pids apart.

  None if there is no such process.
  """
  try:
    with open(f"/proc/{pid}/stat") as f:
      # Fields after the name, which may hold spaces and brackets itself.
      fields = f.read().rpartition(")")[2].split()
    with open("/proc/sys/kernel/random/boot_id") as f:
      boot = f.read().strip()
    # A zombie has ended, its parent only has not looked yet.
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"
  except (FileNotFoundError, ProcessLookupError):
    if os.path.exists("/proc/self/stat"):
      return None
  result = subprocess.run(  # macOS
    ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True
  )
  return result.stdout.strip() or None


def _flock(fd: int) -> bool | None:
  """True: taken. False: another has it. None: there is no flock here."""
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
      return False
    if e.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
      return None
    raise
  return True


def _read(fd: int) -> dict[str, Any] | None:
  """Who holds the lock; None if nobody does or it cannot be known."""
  os.lseek(fd, 0, os.SEEK_SET)
  try:
    info = json.loads(os.read(fd, 1 << 16))
    keys = {"host", "pid", "process_start", "started", "token"}
    return info if keys <= info.keys() else None
  except (ValueError, AttributeError):
    return None


def _is_touched(fd: int, seconds: float) -> bool:
  # The file's own times are compared: clocks of hosts differ.
  first, end = os.fstat(fd).st_mtime_ns, time.monotonic() + seconds
  while time.monotonic() < end:
    time.sleep(min(0.5, seconds / 10))
    if os.fstat(fd).st_mtime_ns != first:
      return True
  return False


def say_watching(workdir: str, holder: dict[str, Any], seconds: float) -> None:
  """Says why nothing happens for a while."""
  logger.warning(
    "%s was in use by pid %d on %s; watching for %.0f s whether it lives",
    workdir, holder["pid"], holder["host"], seconds,
  )  # fmt: skip


def take_over(workdir: str, holder: dict[str, Any], alive: bool) -> None:
  """Says that a dead run's place is taken.

  Raises:
    RunLockError: it lives.
  """
  if alive:
    raise RunLockError(in_use(workdir, holder))
  logger.warning(
    "taking over %s from a run that died (pid %d on %s, started %s)",
    workdir, holder["pid"], holder["host"], holder["started"],
  )  # fmt: skip


def in_use(workdir: str, info: dict[str, Any] | None) -> str:
  who = "another run"
  if info is not None:
    who = (
      f"the run with pid {info['pid']} on {info['host']}, started "
      f"{info['started']}"
    )
  return f"{workdir} is in use by {who}; stop it, or take another workdir"


def _unwritable(workdir: str, error: OSError) -> RunLockError:
  return RunLockError(
    f"cannot write to the workdir {workdir}: {error.strerror or error}"
  )


class PreemptionGuard:
  """Turns SIGTERM and Ctrl-C into a request that the training loop polls.

  A second SIGTERM changes nothing; a second Ctrl-C ends the process at once
  with EXIT_INTERRUPTED. On leaving the context the old handlers are back.
  Signals reach Python's main thread only: elsewhere (a notebook's worker) this
  does nothing but say so.

  With several processes each has to ask `should_stop` at the same steps; JAX
  sees to it that all get the same answer, whichever of them got the signal.
  """

  def __init__(self):
    self._requested = threading.Event()
    self._old: dict[int, Any] = {}

  @property
  def requested(self) -> bool:
    """Whether this process was asked to stop."""
    return self._requested.is_set()

  def should_stop(self, step: int) -> bool:
    """Whether to save and stop after this step; the same on all processes."""
    import jax

    if jax.process_count() == 1:
      return self.requested
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def request(self) -> None:
    """Asks all processes to stop, as a signal to this one does."""
    if not self.requested and _jax_watches_sigterm():
      os.kill(os.getpid(), signal.SIGTERM)  # how the others hear of it
    self._requested.set()

  def __enter__(self) -> Self:
    if threading.current_thread() is not threading.main_thread():
      logger.warning(
        "not on the main thread: SIGTERM and Ctrl-C are not caught"
      )
      return self
    for number in (signal.SIGTERM, signal.SIGINT):
      if number == signal.SIGTERM and _jax_watches_sigterm():
        continue
      self._old[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *exc_info) -> None:
    for number, handler in self._old.items():
      # None: the old handler was not set from Python.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    self._old.clear()

  def _on_signal(self, number: int, frame: types.FrameType | None) -> None:
    name = signal.Signals(number).name
    if number == signal.SIGINT and self.requested:
      _say(f"{name} again: stopping at once, without saving")
      os._exit(EXIT_INTERRUPTED)
    if not self.requested:
      again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
      _say(f"{name}: saving after this step, then stopping{again}")
    self.request()


def _jax_watches_sigterm() -> bool:
  """Whether JAX's preemption service has SIGTERM, as with several processes."""
  if "jax" not in sys.modules:
    return False
  import jax

  return jax.distributed.is_initialized() and jax.process_count() > 1


def _say(text: str) -> None:
  # Not logging: its lock may be held by the very code that was interrupted.
  os.write(2, f"moejax: {text}\n".encode())
