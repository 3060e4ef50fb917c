# SPDX-License-Identifier: Apache-2.0
"""Faults at a step of a run, injected as an evaluation's task."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

from moejax.checkpoint.writer import THREAD
from tests.small_run import command


def at(run, *, step, do, what=""):
  """Does something to the run after one of its steps."""
  if run.step == step:
    ACTIONS[do](what)
  return {}


def option(step, do, what=""):
  """The command line's words for a fault at a step."""
  task = f"tests.faults.faulty.at(step={step}, do={do!r}, what={what!r})"
  entry = {"name": "fault", "task": task, "every": 1}
  return [f"--config.eval.sets={json.dumps([entry])}",
          "--config.eval.task_errors=stop"]  # fmt: skip


def children():
  """Processes that this one started, by number."""
  found = []
  for entry in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[1]) == os.getpid():
      found.append(int(entry.name))
  return found


def _signal(name):
  os.kill(os.getpid(), getattr(signal, name))


def _kill_reader(name):
  """One of the processes that read ahead; not Python's own tracker of them."""
  readers = [
    number
    for number in children()
    if "spawn_main" in pathlib.Path(f"/proc/{number}/cmdline").read_text()
  ]
  os.kill(readers[-1], getattr(signal, name))


def _limit_memory(_):
  """No page more than now: the next allocation that needs one fails."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  size = pages * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _start_again(words):
  """The same command a second time, while this one runs."""
  done = subprocess.run(
    command(*words.split()), capture_output=True, text=True, timeout=300
  )
  found = {"status": done.returncode, "error": done.stderr}
  pathlib.Path("second.json").write_text(json.dumps(found))


def _raise_on(process):
  """On one process of a run alone."""
  import jax

  if jax.process_index() == int(process):
    raise ValueError("it cannot be evaluated")


def _wait_for_saves():
  for thread in threading.enumerate():
    if thread.name == THREAD:
      thread.join()


def _jump(days):
  """Python's clock is wrong from now on; no save goes on meanwhile."""
  _wait_for_saves()
  right = time.time
  time.time = lambda: right() + float(days) * 86400


def _remove(folder):
  """While a save may be making files in it."""
  while pathlib.Path(folder).exists():
    shutil.rmtree(folder, ignore_errors=True)


def _remove_saved(folder):
  """While no save goes on: the next would make it anew."""
  _wait_for_saves()
  _remove(folder)


def _move(words):
  source, target = words.split()
  shutil.move(source, target)


ACTIONS = {
  "signal": _signal,
  "kill_reader": _kill_reader,
  "limit_memory": _limit_memory,
  "start_again": _start_again,
  "jump": _jump,
  "raise_on": _raise_on,
  "move": _move,
  "remove": _remove,
  "remove_saved": _remove_saved,
  "exit": lambda status: sys.exit(int(status)),
}
