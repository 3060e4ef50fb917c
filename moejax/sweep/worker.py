# SPDX-License-Identifier: Apache-2.0
"""A process that trains one run after the other, so that they share programs.

A run that fails leaves the process to the next one; a process that dies (out of
memory, say) takes only its run with it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from moejax.errors import UserError
from moejax.runlock import RunLockError
from moejax.sweep.sources import router_files
from moejax.sweep.spec import PlannedRun
from moejax.sweep.state import (
  DONE,
  FAILED,
  HELD,
  WAITING,
  RunState,
  is_held,
  write_state,
)

LOG = "log.txt"


class Worker:
  """Handle of such a process, in the process that started it.

  Attributes:
    place: where it computes.
    run: what it works on; None while it waits.
    started: when it began with it, by `time.monotonic`.
  """

  def __init__(self, workdir: Path, place: dict[str, str]):
    """Args:
    workdir: the sweep's folder.
    place: environment that says where it computes, from `places`.
    """
    context = multiprocessing.get_context("spawn")
    self._connection, theirs = context.Pipe()
    self._process = context.Process(
      target=_main, args=(theirs, workdir, place), name="moejax-sweep"
    )
    self._process.start()
    theirs.close()
    self.place = place
    self.run: PlannedRun | None = None
    self.started = 0.0

  def start(self, run: PlannedRun) -> None:
    self.run, self.started = run, time.monotonic()
    self._connection.send(run)

  @property
  def waitable(self) -> Connection:
    """Is ready when the run has ended, or the process has."""
    return self._connection

  def result(self) -> RunState:
    """How the run ended; of a process that died, that it failed."""
    seconds = time.monotonic() - self.started
    try:
      state = self._connection.recv()
    except (EOFError, OSError):
      self._process.join()
      code = self._process.exitcode
      # Who sends SIGTERM wants it to stop: no fault of the run.
      asked = code == -signal.SIGTERM
      state = RunState(WAITING if asked else FAILED, _death(code), seconds)
    self.run = None
    return state

  @property
  def alive(self) -> bool:
    return self._process.is_alive()

  def stop(self) -> None:
    """Asks it to save and end."""
    if self.alive:
      self._process.terminate()

  def close(self) -> None:
    """Ends an idle process."""
    self._connection.close()
    self._process.join()


def _death(code: int | None) -> str:
  """What an exit code says, in a line."""
  if code is None or code >= 0:
    return f"the process ended with exit code {code}; see {LOG}"
  name = signal.Signals(-code).name
  hint = ", often for want of memory" if name == "SIGKILL" else ""
  return f"the process was ended by {name}{hint}; see {LOG}"


def places(jobs: int, gpus: list[str]) -> list[dict[str, str]]:
  """Environments of so many workers at a time.

  Args:
    jobs: workers.
    gpus: of this machine. Each worker gets one of its own where there are
      enough, else as many share one, and its memory; a single worker all.
  """
  if jobs == 1 or not gpus:
    return [{} for _ in range(jobs)]
  sharing = -(-jobs // len(gpus))
  memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / sharing:.3f}"}
  return [
    {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}
    | (memory if sharing > 1 else {})
    for i in range(jobs)
  ]


def _main(connection: Connection, workdir: Path, place: dict[str, str]) -> None:
  """The process: trains what it is sent until nobody sends any more."""
  # Ctrl-C is for the command, which then asks this process to save.
  os.setpgid(0, 0)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  os.environ.update(place)
  while True:
    try:
      run = connection.recv()
    except (EOFError, OSError):
      return
    state = _attempt(run, workdir / run.name)
    try:
      connection.send(state)
    except OSError:  # the sweep was killed: nobody else will write it down
      if state.state not in (WAITING, HELD):
        write_state(workdir / run.name, state)
      return


def _attempt(run: PlannedRun, folder: Path) -> RunState:
  """Trains one run; what it prints goes to its own log."""
  from moejax.train import train

  if is_held(folder):
    return RunState(HELD)
  folder.mkdir(parents=True, exist_ok=True)
  start = time.monotonic()
  state, message = DONE, ""
  files = None
  with open(folder / LOG, "ab", buffering=0) as log:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {run.name}", flush=True)
    try:
      files = router_files(run.config)
      # Now: of a run that is killed, this is all there will be.
      write_state(folder, RunState(WAITING, router_files=files))
      # A page takes seconds; `moejax report` draws those that are wanted.
      if train(run.config, folder, report=False):
        state = WAITING
    except RunLockError as e:
      state, message = HELD if is_held(folder) else FAILED, str(e)
      print(message, flush=True)
    except UserError as e:
      state, message = FAILED, str(e)
      print(message, flush=True)
      if e.__cause__ is not None:  # what a router of one's own raised
        traceback.print_exception(e.__cause__)
    except Exception as e:  # a router of one's own may raise anything
      state, message = FAILED, f"{type(e).__name__}: {e}".splitlines()[0]
      traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
  return RunState(state, message, time.monotonic() - start, files)


def _end_with_parent() -> None:
  """A killed sweep leaves no run at work: it saves and ends."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os.kill(os.getpid(), signal.SIGTERM)
