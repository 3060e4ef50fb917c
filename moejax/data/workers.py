# SPDX-License-Identifier: Apache-2.0
"""Processes that write parts: both ends of the line between them.

The parent sends part numbers; a worker answers with JSON lines: bytes done, a
part finished, or an error. A worker ends when its stdin closes, so none
outlives its parent. They are plain programs rather than `multiprocessing`
children: a script that calls `prepare` needs no `__main__` guard.
"""

import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from moejax.data import parts, sources
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import DataError

_REPORT_SECONDS = 0.2
_PROGRAM = "import sys; from moejax.data.workers import work; work(sys.argv[1])"


def write_parts(
  building: pathlib.Path,
  left: Sequence[int],
  processes: int,
  advance: Callable[[float], None],
) -> None:
  """Has worker processes write the parts; the first error ends all of them.

  Args:
    building: the store in the making, with its plan and tokenizer.
    left: numbers of the parts to write.
    processes: how many at a time.
    advance: told the bytes of text done.

  Raises:
    DataError: what a worker found wrong, or that one died.
  """
  path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
  environment = os.environ | {"PYTHONPATH": path}
  command = [sys.executable, "-c", _PROGRAM, str(building)]
  messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
  workers = []
  try:
    for number in range(processes):
      worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
      )  # fmt: skip
      workers.append(worker)
      threading.Thread(
        target=_listen, args=(number, worker, messages), daemon=True
      ).start()
    waiting = list(left)
    for worker in workers:
      _send(worker, waiting.pop(0))
    unfinished = len(left)
    while unfinished:
      number, message = messages.get()
      if message is None:
        code = workers[number].wait()
        raise DataError(
          f"a tokenizing process died (exit code {code}; -9 is often lack of "
          "memory: try --processes=1); the same command goes on"
        )
      if "error" in message:
        raise DataError(message["error"])
      if "done" in message:
        unfinished -= 1
        if waiting:
          _send(workers[number], waiting.pop(0))
      else:
        advance(message["advance"])
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()
      with contextlib.suppress(BrokenPipeError):
        worker.stdin.close()


def _send(worker: subprocess.Popen, index: int) -> None:
  with contextlib.suppress(BrokenPipeError):  # its death arrives as a message
    worker.stdin.write(f"{index}\n")
    worker.stdin.flush()


def _listen(
  number: int, worker: subprocess.Popen, messages: queue.Queue
) -> None:
  with worker.stdout:
    for line in worker.stdout:
      messages.put((number, json.loads(line)))
  messages.put((number, None))


def work(folder: str) -> None:
  """A worker: writes the parts whose numbers come on stdin, until it closes."""
  numbers: list[int] = []
  ready = threading.Condition()

  def listen() -> None:
    for line in sys.stdin:
      with ready:
        numbers.append(int(line))
        ready.notify()
    os._exit(0)  # the parent is done with us, or dead

  # What a library prints must not come between the reports.
  reports, sys.stdout = sys.stdout, sys.stderr

  def report(**message: Any) -> None:
    print(json.dumps(message), file=reports, flush=True)

  pending, last = 0.0, time.monotonic()

  def advance(count: float) -> None:
    nonlocal pending, last
    pending += count
    if time.monotonic() - last > _REPORT_SECONDS:
      report(advance=pending)
      pending, last = 0.0, time.monotonic()

  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
  threading.Thread(target=listen, daemon=True).start()
  try:
    path = pathlib.Path(folder)
    plan = parts.Plan.load(path)
    source = sources.open_source(plan.spec, plan.key["text_key"])
    tokenizer = load_tokenizer(path)
    while True:
      with ready:
        ready.wait_for(lambda: numbers)
        index = numbers.pop(0)
      parts.write_part(path, plan, index, source, tokenizer, advance)
      report(done=index)
  except DataError as e:
    report(error=str(e))
