# SPDX-License-Identifier: Apache-2.0
"""Signs of life of a run's processes, in its folder."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, NoReturn, Self

from moejax.runlock import process_start

FOLDER = "processes"
BEAT = 1.0  # seconds between signs, and between looks at those of the others
# What is more between two looks was a pause of this process, not a silence.
SLEPT = 5 * BEAT
# Seconds that a process has to end by itself, and to say why, once another has:
# what ended that one, as a save that failed, often ends both.
PATIENCE = 10.0
EXIT_PEER_LOST = 76  # EX_PROTOCOL; the same command goes on

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _set_on_abort(handler: Any) -> ctypes.c_void_p:
  """Sets C's handler of SIGABRT; returns the one before, to be set again."""
  libc = ctypes.CDLL(None)
  libc.signal.restype = ctypes.c_void_p
  return ctypes.c_void_p(libc.signal(signal.SIGABRT, handler))


class Peers:
  """Writes `processes/I.json`, and ends this process when another is lost.

  A process is lost if its file says so, and for a while, if it is of this host
  and no longer runs, or if its file was not touched for `lost_after` seconds.
  One that leaves as it should removes its file.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    start: int,
    index: int,
    count: int,
    lost_after: float,
  ):
    """Nothing happens before the `with` block.

    Args:
      workdir: of the run, on a disk that all share.
      start: a number that the processes of this start have in common, and no
        earlier start has: what that left is ignored.
      index, count: of this process, and of all.
      lost_after: seconds without a sign of life.
    """
    self._folder = Path(workdir) / FOLDER
    self._start, self._index, self._count = start, index, count
    self._lost_after = lost_after
    self._silence = {i: _Silence() for i in range(count)}
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._on_abort = _Handler(self._abort)  # as long as C may call it
    self._known: dict[int, dict[str, Any]] = {}  # what each last said
    self._ended: dict[int, float] = {}  # since when each is known to have

  def __enter__(self) -> Self:
    self._folder.mkdir(parents=True, exist_ok=True)
    self._write(None)
    # JAX aborts in a thread without Python when process 0 is lost: too late for
    # a handler of the module `signal`.
    self._before_abort = _set_on_abort(self._on_abort)
    self._thread.start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    _set_on_abort(self._before_abort)
    self._stop.set()
    self._thread.join()
    if kind is None:
      self._path(self._index).unlink(missing_ok=True)

  def leave(self, why: str, follows: bool = False) -> None:
    """Tells the others that this process ends, why, and whether for another."""
    self._stop.set()
    with contextlib.suppress(OSError):
      self._write(why, follows)

  def wait_for_others(self) -> None:
    """Waits until all have ended, or had the time to, if this is process 0.

    JAX's coordinator ends with it, and aborts them: they may be about to say
    what went wrong.
    """
    if self._index:
      return
    end = time.monotonic() + PATIENCE + 2 * BEAT  # they look that often
    while any(map(self._runs, range(1, self._count))):
      if time.monotonic() > end:
        return
      time.sleep(BEAT / 10)
    time.sleep(BEAT / 5)  # from its last word to its end

  def find_lost(self, error: Exception) -> str | None:
    """Waits until it is clear which process is lost; None if none is.

    Args: error: what this process came upon; said if the wait is long.
    """
    patience = self._lost_after + 2 * BEAT
    began, said = time.monotonic(), False
    while (waited := time.monotonic() - began) < patience:
      if (lost := self._lost()) is not None:
        return lost
      if waited > 2 * BEAT and not said:
        said = True
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self._write_line(
          f"process {self._index} of {self._count}: {what}; looking whether "
          f"another process is lost, up to {patience:.0f} s..."
        )
      time.sleep(BEAT / 4)
    return None

  def stop_for(self, lost: str) -> NoReturn:
    """Ends this process because another is lost; says so, to the others too."""
    self._say(lost)
    self.leave(lost, follows=True)
    self.wait_for_others()
    os._exit(EXIT_PEER_LOST)

  def _say(self, lost: str) -> None:
    self._write_line(
      f"process {self._index} of {self._count} stops: {lost}. Start all again "
      "with the same command: the run goes on from its newest checkpoint"
    )

  def _write_line(self, text: str) -> None:
    os.write(2, f"\nmoejax: {text}\n".encode())  # from any thread, at any time

  def _abort(self, signum: int) -> None:
    """A library ends this process, and has said why in words of its own.

    From memory alone: the run's disk may have been on the host that is lost.
    """
    _set_on_abort(self._before_abort)
    try:
      self._name_the_lost()
    finally:
      signal.raise_signal(signum)  # in this thread, when it leaves here

  def _name_the_lost(self) -> None:
    known = list(self._known.items())
    said = [_ending(*it) for it in known if it[1]["ended"] is not None]
    said += [f"{_who(*it)} is dead" for it in known if _is_dead(it[1])]
    if said:
      self._say(said[0])
      os._exit(EXIT_PEER_LOST)
    if 0 in self._known:
      self._write_line(
        f"process {self._index} of {self._count} was aborted, as said above; a "
        f"leader or coordinator that is lost is {_who(0, self._known[0])}"
      )

  def _watch(self) -> None:
    # Process 0 after the others: JAX's coordinator ends with it.
    patience = PATIENCE if self._index else PATIENCE + 2 * BEAT
    while not self._stop.wait(BEAT / 4):
      with contextlib.suppress(OSError):
        os.utime(self._path(self._index))
      lost = self._lost(patience)
      if lost is not None and not self._stop.is_set():
        self.stop_for(lost)

  def _lost(self, patience: float = 0) -> str | None:
    for index in range(self._count):
      if index != self._index and (why := self._why_lost(index, patience)):
        return why
    return None

  def _runs(self, index: int) -> bool:
    found = self._read(index)
    if found is None or found["ended"] is not None or _is_dead(found):
      return False
    return self._silence[index].seconds(found["touched"]) < SLEPT

  def _why_lost(self, index: int, patience: float) -> str | None:
    """Of one process; None if it lives, left, or has not come yet.

    Args: patience: seconds from when it said that it ends.
    """
    found = self._read(index)
    if found is None:
      return None
    self._known[index] = found
    who = _who(index, found)
    if found["ended"] is None and _is_dead(found):
      found = self._read(index)  # its last word may have come since
      if found is None:
        return None
      if found["ended"] is None:
        return f"{who} is dead"
    if found["ended"] is not None:
      since = self._ended.setdefault(index, time.monotonic())
      if time.monotonic() - since < patience:
        return None
      return _ending(index, found)
    silent = self._silence[index].seconds(found["touched"])
    if silent > self._lost_after:
      return f"{who} gave no sign of life for {silent:.0f} s"
    return None

  def _read(self, index: int) -> dict[str, Any] | None:
    """What a process says; None for nothing, or what an earlier start left."""
    path = self._path(index)
    try:
      found = json.loads(path.read_text())
      found["touched"] = path.stat().st_mtime
    except (OSError, ValueError):  # not there, or not any more
      return None
    return found if found["start"] == self._start else None

  def _write(self, ended: str | None, follows: bool = False) -> None:
    text = json.dumps({
      "start": self._start,
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "process_start": process_start(os.getpid()),
      "ended": ended,
      "follows": follows,
    })  # fmt: skip
    partial = self._path(self._index).with_suffix(f".{os.getpid()}")
    partial.write_text(text)
    partial.replace(self._path(self._index))

  def _path(self, index: int) -> Path:
    return self._folder / f"{index}.json"


class _Silence:
  """Seconds without a sign of life, as one sees that looks every BEAT."""

  def __init__(self):
    self._touched, self._looked, self._seconds = -1.0, time.monotonic(), 0.0

  def seconds(self, touched: float) -> float:
    """Args: touched: the file's time, compared with itself: clocks differ."""
    now = time.monotonic()
    # If this process, or the whole machine, slept, the other may have too.
    self._seconds += min(now - self._looked, SLEPT)
    if touched != self._touched:
      self._touched, self._seconds = touched, 0.0
    self._looked = now
    return self._seconds


def _who(index: int, found: dict[str, Any]) -> str:
  return f"process {index} (pid {found['pid']} on {found['host']})"


def _ending(index: int, found: dict[str, Any]) -> str:
  """What ended a process: the one that it followed, if it did."""
  if found["follows"]:
    return found["ended"]
  return f"{_who(index, found)} ended: {found['ended']}"


def _is_dead(found: dict[str, Any]) -> bool:
  """Of this host, and runs no longer; others only their files can tell of."""
  here = found["host"] == socket.gethostname()
  return here and process_start(found["pid"]) != found["process_start"]
