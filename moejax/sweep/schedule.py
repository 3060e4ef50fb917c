# SPDX-License-Identifier: Apache-2.0
"""Runs in turn, or a few at a time, until all are done or someone stops it."""

import dataclasses
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

from moejax.hardware import local_gpus
from moejax.metrics import METRICS, last_step
from moejax.progress import ProgressBar, format_seconds, progress_bar
from moejax.runlock import PreemptionGuard
from moejax.sweep.spec import PlannedRun
from moejax.sweep.state import (
  DONE,
  FAILED,
  HELD,
  WAITING,
  RunState,
  has_diverged,
  read_state,
  write_state,
)
from moejax.sweep.worker import LOG, Worker, places

_LOOK_EVERY = 0.2  # seconds; a signal waits as long


def run_all(workdir: Path, runs: list[PlannedRun], jobs: int) -> bool:
  """Trains all of them; a run that fails does not keep the others.

  Args:
    workdir: the sweep's folder.
    runs: what is to do, in this order.
    jobs: how many at a time.

  Returns:
    Whether it was stopped before the end, by SIGTERM or Ctrl-C; the runs then
    at work have saved what they had.
  """
  waiting = list(runs)
  jobs = min(jobs, len(runs))
  steps = sum(run.config.train.num_steps for run in runs)
  done = {run.name: last_step(workdir / run.name / METRICS) for run in runs}
  workers: list[Worker] = []
  free = places(jobs, local_gpus())
  with (
    PreemptionGuard() as guard,
    progress_bar("steps of all runs", steps, done=sum(done.values())) as bar,
  ):
    progress = _Progress(workdir, bar, done)
    try:
      while (waiting and not guard.requested) or any(w.run for w in workers):
        if guard.requested:
          for worker in workers:
            worker.stop()
        elif waiting and len(workers) < jobs:
          workers.append(Worker(workdir, free.pop()))
        for worker in workers:
          if not worker.run and waiting and not guard.requested:
            worker.start(waiting.pop(0))
        ended = _ended(workers)
        progress.look([w.run for w in workers if w.run])
        for worker in ended:
          run = worker.run
          assert run is not None
          _record(workdir, run, worker.result(), progress.say)
        free += [w.place for w in workers if not (w.alive or w.run)]
        workers = [w for w in workers if w.alive or w.run]
    finally:
      for worker in workers:
        worker.stop() if worker.run else None
        worker.close()
    return guard.requested


def _ended(workers: list[Worker]) -> list[Worker]:
  """Those that have ended their run, soon."""
  busy = {w.waitable: w for w in workers if w.run}
  return [busy[c] for c in connection.wait(list(busy), _LOOK_EVERY)]


def _record(
  workdir: Path, run: PlannedRun, state: RunState, say: Callable[[str], None]
) -> None:
  if state.state == WAITING:
    step = last_step(workdir / run.name / METRICS)
    say(f"{run.name}: stopped at {step}/{run.config.train.num_steps}, saved")
    return
  if state.state == HELD:
    say(f"{run.name}: another process trains it; left alone")
    return
  if state.router_files is None:  # its process died: what it began with
    files = read_state(workdir / run.name).router_files
    state = dataclasses.replace(state, router_files=files)
  write_state(workdir / run.name, state)
  took = format_seconds(state.seconds)
  if state.state == DONE:
    lost = has_diverged(workdir / run.name)
    say(f"{run.name}: done in {took}" + ", its loss is not finite" * lost)
  elif state.state == FAILED:
    say(f"{run.name}: FAILED after {took}: {state.message}")
    say(f"  its log: {workdir / run.name / LOG}")


class _Progress:
  """Steps of all runs, read from their logs."""

  def __init__(self, workdir: Path, bar: ProgressBar, done: dict[str, int]):
    self._workdir, self._bar = workdir, bar
    self._seen = dict(done)
    self.say = bar.message

  def look(self, runs: list[PlannedRun]) -> None:
    """Takes in what the runs at work have logged since."""
    for run in runs:
      step = last_step(self._workdir / run.name / METRICS)
      before = self._seen[run.name]
      if step > before:
        self._seen[run.name] = step
        self._bar.advance(step - before)
