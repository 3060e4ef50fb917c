# SPDX-License-Identifier: Apache-2.0
"""The logs of a run: JSON lines that a resumed run continues exactly.

  metrics.jsonl      per step, only what (config, seed, step) determines: a
                     killed and resumed run ends with the bytes of an unbroken
                     one
  timing.jsonl       per step, what differs between runs: seconds, tokens/s
  eval.jsonl         per evaluation, `validation/...`
  router_load.jsonl  every few steps, the share of assignments of each expert
  samples.jsonl      text that the model wrote
  skipped.jsonl      per step that was not taken, why, and the rows of its batch
  events/            the numbers of the first three again, for TensorBoard

`step` counts finished optimizer steps, so the first line is of step 1, and a
checkpoint of step N belongs to lines 1..N. Keys are paths such as `loss/xent`,
sorted. Floats are written as the shortest decimal that reads back as the same
float32 (float64 in timing.jsonl). Strict JSON has no NaN, and null would hide
which of them it was, so the strings "NaN", "Infinity" and "-Infinity" stand for
them; Python's `float()` takes them, and `read_jsonl` turns them back.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from moejax import event_file
from moejax.errors import DataError

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
EVALUATION = "eval.jsonl"
LOAD = "router_load.jsonl"
SAMPLES = "samples.jsonl"
SKIPPED = "skipped.jsonl"
FILES = (METRICS, TIMING, EVALUATION, LOAD, SAMPLES, SKIPPED)
EVENTS = "events"

Number = float | int | np.number
NON_FINITE = {
  "NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")
}  # fmt: skip
TEXT_KEYS = ("prompt", "text")
# Lines that a full disk refuses wait in memory, up to this many bytes.
MAX_PENDING = 16 << 20
# More than any line of METRICS has.
MAX_LINE = 1 << 16

logger = logging.getLogger(__name__)


class RunLog:
  """Writes the logs of one run; one process of a run owns it.

  A log that cannot be written (full disk, lost mount) is one warning, never an
  error: lines wait in memory and are written once there is space.
  """

  def __init__(
    self, workdir: str | os.PathLike, resume_step: int, owner: bool = True
  ):
    """Opens the logs in `workdir`, which is created if needed.

    Args:
      workdir: the run's folder.
      resume_step: finished steps in the checkpoint that the run goes on from;
        0 starts afresh. Lines of later steps and a torn last line are cut off,
        each file in one atomic truncation.
      owner: False for the other processes of the run, which write nothing.
    """
    self._owner = owner
    self._workdir = Path(workdir)
    self._files: dict[str, _LineFile] = {}
    self._events: event_file.EventFile | None = None
    self._warned = False
    self._last = dict.fromkeys(FILES, resume_step if resume_step else -1)
    if not owner:
      return
    with self._survive_disk():
      self._workdir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
      with self._survive_disk():
        # At 0 nothing is kept: step 0 lines (an evaluation before training)
        # are written again.
        kept = _cut(self._workdir / name, resume_step if resume_step else -1)
        if name == METRICS and kept is not None and 0 <= kept < resume_step:
          logger.warning(
            "%s ends at step %d but the checkpoint is of step %d; the lines "
            "between are lost", self._workdir / name, kept, resume_step,
          )  # fmt: skip
    with self._survive_disk():
      self._events = event_file.EventFile(self._workdir / EVENTS, resume_step)

  def step(self, step: int, metrics: Mapping[str, Number]) -> None:
    """Logs one optimizer step; values must not depend on time or machine.

    Raises:
      ValueError: a step that is not after the one before, which would make
        the file differ from an unbroken run's.
    """
    if step <= self._last[METRICS]:
      raise ValueError(f"step {step} is not after {self._last[METRICS]}")
    self._write(METRICS, step, metrics)
    self._add_events(step, metrics, prefix="")

  def timing(self, step: int, values: Mapping[str, Number]) -> None:
    """Logs seconds and rates of a step: whatever differs between runs."""
    self._write(TIMING, step, values, single=False)
    self._add_events(step, values, prefix="timing/")

  def evaluation(self, step: int, metrics: Mapping[str, Number]) -> None:
    """Logs an evaluation, e.g. {"validation/xent": nats per token}."""
    self._write(EVALUATION, step, metrics)
    self._add_events(step, metrics, prefix="")

  def load(self, step: int, load_LE: np.ndarray) -> None:
    """Logs expert loads: share of a layer's assignments; 1/E is fair."""
    load_LE = np.asarray(load_LE)
    if load_LE.ndim != 2:
      raise ValueError(f"load has shape {load_LE.shape}, not [layers, experts]")
    self._write(LOAD, step, {"load": load_LE})

  def sample(self, step: int, prompt: str, text: str) -> None:
    """Logs what the model wrote after `prompt`."""
    self._write(SAMPLES, step, {"prompt": prompt, "text": text})

  def skipped(self, step: int, reason: int, rows: np.ndarray) -> None:
    """Logs a step that was not taken.

    Args:
      step: of the run.
      reason: as `moejax.stability` numbers them.
      rows: [B, 2] source and row of each row of the batch.
    """
    self._write(SKIPPED, step, {"reason": reason, "rows": rows})

  def flush(self) -> None:
    """Forces all lines to disk; call before the checkpoint of their step."""
    for file in self._files.values():
      with self._survive_disk():
        file.flush()
    self._with_events(lambda events: events.flush())

  def close(self) -> None:
    self.flush()
    for file in self._files.values():
      with self._survive_disk():
        file.close()
    self._files.clear()
    self._with_events(lambda events: events.close())
    self._events = None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def _write(
    self, name: str, step: int, values: Mapping[str, Any], single: bool = True
  ) -> None:
    if step < self._last[name]:
      raise ValueError(f"{name}: step {step} is before {self._last[name]}")
    if "step" in values:
      raise ValueError(f"{name}: 'step' is not a metric's name")
    self._last[name] = step
    if not self._owner:
      return
    line = encode_line(step, values, single)
    if name not in self._files:
      self._files[name] = _LineFile(self._workdir / name)
    with self._survive_disk():
      self._files[name].append(line)

  def _add_events(self, step: int, values: Mapping, prefix: str) -> None:
    self._with_events(lambda events: events.add(step, values, prefix))

  def _with_events(self, do) -> None:
    """Event files cannot be mended after a torn write: off at first failure."""
    if self._events is None:
      return
    try:
      do(self._events)
    except OSError as e:
      self._events.abandon()
      self._events = None
      self._warn(e)

  @contextlib.contextmanager
  def _survive_disk(self) -> Iterator[None]:
    try:
      yield
    except OSError as e:
      self._warn(e)

  def _warn(self, error: OSError) -> None:
    if not self._warned:
      self._warned = True
      logger.warning(
        "cannot write logs in %s: %s; training goes on, log lines wait in "
        "memory for space, TensorBoard events may stop",
        self._workdir, error.strerror or error,
      )  # fmt: skip


class _LineFile:
  """A file that only ever grows by whole lines."""

  def __init__(self, path: Path):
    self._path = path
    self._fd: int | None = None
    self._size = 0
    self._pending = bytearray()
    self._torn = False

  def append(self, line: bytes) -> None:
    """Writes what is pending and `line`.

    Raises:
      OSError: nothing was written; the lines stay pending.
    """
    if len(self._pending) + len(line) > MAX_PENDING:
      logger.warning("%s: dropped %d bytes of lines that found no space",
                     self._path, len(self._pending))  # fmt: skip
      self._pending.clear()
    self._pending += line
    if self._fd is None:
      flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
      self._fd = os.open(self._path, flags, 0o666)
      self._size = os.fstat(self._fd).st_size
    if self._torn:
      os.ftruncate(self._fd, self._size)
    data = bytes(self._pending)
    written = 0
    self._torn = True
    try:
      while written < len(data):
        written += os.write(self._fd, data[written:])
    except OSError:
      # A full disk takes part of a line; take it back now, while it is last.
      os.ftruncate(self._fd, self._size)
      self._torn = False
      raise
    self._torn = False
    self._size += written
    self._pending.clear()

  def flush(self) -> None:
    if self._pending:
      self.append(b"")
    if self._fd is not None:
      os.fsync(self._fd)

  def close(self) -> None:
    if self._fd is not None:
      fd, self._fd = self._fd, None
      os.close(fd)


def encode_line(
  step: int, values: Mapping[str, Any], single: bool = True
) -> bytes:
  """One log line, the same bytes for the same values in any order.

  Args:
    step: finished optimizer steps.
    values: numbers, strings, or arrays of numbers by path.
    single: write floats as float32, else as float64.
  """
  items = [("step", int(step)), *sorted(values.items())]
  body = ", ".join(f"{json.dumps(k)}: {_encode(v, single)}" for k, v in items)
  # A lone surrogate in a sample has no UTF-8; its escape is valid JSON.
  return f"{{{body}}}\n".encode("utf-8", "backslashreplace")


def _encode(value: Any, single: bool) -> str:
  if isinstance(value, np.ndarray) and value.ndim == 0:
    value = value[()]
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False)
  if isinstance(value, (bool, np.bool_)):
    return "true" if value else "false"
  if isinstance(value, (int, np.integer)):
    return str(int(value))
  if isinstance(value, (np.ndarray, Sequence)):
    return "[" + ", ".join(_encode(v, single) for v in value) + "]"
  with np.errstate(over="ignore"):
    number = np.float32(value) if single else np.float64(value)
  if not np.isfinite(number):
    if np.isnan(number):
      return '"NaN"'
    return '"Infinity"' if number > 0 else '"-Infinity"'
  return str(number)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a log as dictionaries, in order.

  A torn last line, as a run that is still going or was killed leaves it, is
  left out; a damaged line elsewhere is left out with a warning.

  Raises:
    DataError: no such file, or not readable.
  """
  try:
    data = Path(path).read_bytes()
  except OSError as e:
    raise DataError(f"cannot read {path}: {e.strerror}") from e
  # Not splitlines(): samples may hold other characters that end lines.
  lines = data.split(b"\n")
  rows = []
  for number, line in enumerate(lines[:-1], 1):
    row = _decode(line)
    if row is not None:
      rows.append(row)
    elif number < len(lines) - 1:
      logger.warning("%s, line %d is damaged; left out", path, number)
  return rows


def last_step(path: str | os.PathLike) -> int:
  """The step of a log's last whole line, or 0."""
  row = last_row(path)
  return 0 if row is None else row["step"]


def last_row(path: str | os.PathLike) -> dict[str, Any] | None:
  """A log's last whole line, of a run that may be going on.

  Reads the end of the file only.
  """
  try:
    with open(path, "rb") as f:
      f.seek(max(0, os.fstat(f.fileno()).st_size - MAX_LINE))
      lines = f.read().split(b"\n")
  except FileNotFoundError:
    return None
  except OSError as e:
    raise DataError(f"cannot read {path}: {e.strerror}") from e
  rows = (_decode(line) for line in reversed(lines[:-1]))
  return next((row for row in rows if row is not None), None)


def _decode(line: bytes) -> dict[str, Any] | None:
  """The row of a line, or None if it is not a whole log line."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  return {k: v if k in TEXT_KEYS else _finite(v) for k, v in row.items()}


def _finite(value: Any) -> Any:
  if isinstance(value, list):
    return [_finite(v) for v in value]
  if isinstance(value, str) and value in NON_FINITE:
    return NON_FINITE[value]
  return value


def _cut(path: Path, last_step: int) -> int | None:
  """Ends a log after its last whole line of at most `last_step`.

  Steps never go down in a log, so the lines to keep come first, and one
  truncation, which is atomic and needs no free space, does it.

  Returns:
    The step of the last line kept, -1 if none is, None without a file.
  """
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return None
  end = data.rfind(b"\n") + 1
  kept = -1
  while end > 0:
    start = data.rfind(b"\n", 0, end - 1) + 1
    row = _decode(data[start:end])
    if row is not None and row["step"] <= last_step:
      kept = row["step"]
      break
    end = start
  if end < len(data):
    with open(path, "r+b") as f:
      f.truncate(end)
      f.flush()
      os.fsync(f.fileno())
  return kept
