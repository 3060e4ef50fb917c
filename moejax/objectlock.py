# SPDX-License-Identifier: Apache-2.0
"""One run per address: a lock that is an object, written only if absent.

The object says who holds the run; a running holder writes it again every few
seconds, with another number, which is what tells a dead run from a living one.
A holder that was cut off from the store for long may be taken for dead, so it
looks at the object before each checkpoint and stops if it is another's.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from moejax import storage
from moejax.runlock import (
  LOCK_FILE,
  RunLock,
  RunLockError,
  in_use,
  process_start,
  say_watching,
  take_over,
)

BEAT = 15.0  # seconds between signs of life
# Seconds without one after which a holder counts as dead.
PATIENCE = 60.0
SETTLE = 1.0  # seconds for runs that take over at once to see each other

logger = logging.getLogger(__name__)


class ObjectLock:
  """Holds the run at an address; a context manager, as `RunLock`."""

  def __init__(self, workdir: str, holder: bool = True):
    """Args: workdir: an address; holder: False does nothing at all.

    Nothing happens before `acquire`.
    """
    self.workdir = workdir
    self._path = f"{workdir}/{LOCK_FILE}"
    self._holder = holder
    self._held = False
    self._record: dict[str, Any] = {}
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._beat, name="moejax-lock", daemon=True
    )

  def acquire(self) -> None:
    """Takes the lock, also from a run that has died.

    Raises:
      RunLockError: another run holds it.
      UserError: the store does not answer, or its library is not installed.
    """
    if not self._holder or self._held:
      return
    storage.require_backend(self.workdir)
    self._record = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "machine": _machine(),
      "process_start": process_start(os.getpid()),
      "started": datetime.datetime.now()
      .astimezone()
      .isoformat(timespec="seconds"),
      "token": uuid.uuid4().hex,
      "beat": 0,
    }
    try:
      while not self._create():
        previous = _read(self._path)
        if previous is not None:
          self._require_dead(previous)
          storage.remove(self._path)
      # Of two that saw a dead one, the later removed the lock of the first.
      time.sleep(SETTLE)
      self._held = True
      self.require_held()
    except BaseException:
      self._held = False
      raise
    self._thread.start()

  def require_held(self) -> None:
    """Makes sure that the lock still is this run's.

    Raises:
      RunLockError: another run has taken it over.
      StorageError: the store does not answer.
    """
    if not self._held:
      return
    found = _read(self._path)
    if found is None or found["token"] != self._record["token"]:
      raise RunLockError(in_use(self.workdir, found))

  def release(self) -> None:
    """Gives the lock back; twice is once."""
    if not self._held:
      return
    self._stop.set()
    self._thread.join()
    with contextlib.suppress(storage.StorageError, RunLockError):
      self.require_held()
      storage.remove(self._path)
    self._held = False

  def __enter__(self) -> Self:
    self.acquire()
    return self

  def __exit__(self, *exc_info) -> None:
    self.release()

  def _create(self) -> bool:
    """Writes the lock if there is none; whether it now is this run's."""
    try:
      storage.write(self._path, self._data(), new=True)
    except FileExistsError:
      # Or the answer to the first try was lost.
      found = _read(self._path)
      return found is not None and found["token"] == self._record["token"]
    return True

  def _require_dead(self, previous: dict[str, Any]) -> None:
    if previous["machine"] == _machine():
      own = process_start(previous["pid"])
      alive = own is not None and own == previous["process_start"]
    else:
      say_watching(self.workdir, previous, PATIENCE)
      alive = self._changes(previous)
    take_over(self.workdir, previous, alive)

  def _changes(self, previous: dict[str, Any]) -> bool:
    """Whether the holder gives a sign of life while this waits."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      time.sleep(PATIENCE / 30)
      found = _read(self._path)
      if found is None:
        return False
      if found != previous:
        return True
    return False

  def _beat(self) -> None:
    while not self._stop.wait(BEAT):
      self._record["beat"] += 1
      try:
        self.require_held()
        storage.write(self._path, self._data())
      except RunLockError as e:
        logger.warning("%s; this run stops at its next checkpoint", e)
        return
      except storage.StorageError as e:
        logger.warning("no sign of life: %s", e)

  def _data(self) -> bytes:
    return (json.dumps(self._record, indent=1) + "\n").encode()


def _read(path: str) -> dict[str, Any] | None:
  """Who holds the lock; None if nobody does.

  Raises:
    RunLockError: what is there is no lock.
  """
  try:
    found = json.loads(storage.read(path))
    keys = ("host", "pid", "machine", "process_start", "started", "token")
    return {key: found[key] for key in keys} | {"beat": found["beat"]}
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError):
    raise RunLockError(
      f"{path} is not a lock of moejax; remove it if no run uses that address"
    ) from None


def _machine() -> str:
  """What processes share that see each other's numbers."""
  start = process_start(os.getpid()) or ""
  boot = start.partition(" ")[0]
  try:
    space = os.readlink("/proc/self/ns/pid")
  except OSError:
    space = ""
  return f"{socket.gethostname()} {boot} {space}"


def lock_of(workdir: str | Path, holder: bool = True) -> ObjectLock | RunLock:
  """The lock of a run's folder or address."""
  found = storage.address(workdir)
  return ObjectLock(found, holder) if found else RunLock(workdir, holder)
