# SPDX-License-Identifier: Apache-2.0
"""Where a run's time goes, from its first start on: `launches.jsonl`.

One line each time the run is started or goes on, never cut: when, how long it
took to get to its first step, what the launch before had done in vain, and how
long nothing ran; and one when it comes to its end or is asked to stop, with
what came after its last step. With the lines of `timing.jsonl` that gives
goodput: the share of the whole time in which steps were computed that count.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.metrics import SKIPPED, TIMING, encode_line, read_jsonl
from moejax.progress import format_seconds

LAUNCHES = "launches.jsonl"
END = "end"  # in lines of ends alone
# Parts of a step's seconds that compute nothing.
WAITS = {
  "input_wait": "waiting for data",
  "evaluation": "evaluation",
  "checkpoint": "checkpoints",
}

logger = logging.getLogger(__name__)


def record_launch(
  workdir: str | os.PathLike,
  step: int,
  began: float,
  setup: float,
  compiling: float,
) -> None:
  """Adds a launch to the run's list, before its logs are cut.

  Args:
    workdir: the run's folder.
    step: that it goes on from.
    began: when, in seconds of `time.time`.
    setup: seconds until it began to compile: data, checkpoint, state.
    compiling: seconds of that.
  """
  path = Path(workdir) / LAUNCHES
  redone, stopped = [], began
  if path.exists():
    launches = _rows(path)
    # Not those of a run that this one was branched off.
    first = min([row["wall_time"] for row in launches], default=began)
    done = [
      row for row in _rows(Path(workdir) / TIMING) if row["wall_time"] >= first
    ]
    redone = [row["seconds"] for row in done if row["step"] > step]
    stopped = max(
      [row["wall_time"] for row in done[-1:]]
      + [_last_sign(row) for row in launches[-1:]],
      default=began,
    )
  _append(path, step, {
    "wall_time": began, "setup": setup, "compile": compiling,
    "redone_steps": len(redone), "redone": sum(redone),
    "down": max(0.0, began - stopped),
  })  # fmt: skip


def record_end(
  workdir: str | os.PathLike, step: int, waits: Mapping[str, float]
) -> None:
  """Adds the end of a launch, which did not die.

  Args:
    workdir: the run's folder.
    step: its last.
    waits: seconds since that step, by the keys of `WAITS`.
  """
  found = {END: 1, "wall_time": time.time(), **waits}
  _append(Path(workdir) / LAUNCHES, step, found)


def _append(path: Path, step: int, values: Mapping[str, Any]) -> None:
  line = encode_line(step, values, single=False)
  try:
    with open(path, "ab") as f:
      f.write(line)
      f.flush()
      os.fsync(f.fileno())
  except OSError as e:
    logger.warning("cannot write %s: %s", path, e.strerror or e)


@contextlib.contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
  """Adds the seconds of a `with` block to an entry."""
  start = time.perf_counter()
  try:
    yield
  finally:
    times[name] += time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Seconds of a run, from its first launch to its end or last step.

  Attributes:
    total: all of them.
    parts: by what they went into; `training steps` are those that count.
    launches: how often it was started.
    redone_steps: that were computed again after a stop.
  """

  total: float
  parts: Mapping[str, float]
  launches: int
  redone_steps: int

  @property
  def share(self) -> float:
    return self.parts["training steps"] / max(self.total, 1e-9)

  def describe(self) -> str:
    """One line for people."""
    spent = ", ".join(
      f"{name} {format_seconds(seconds)}"
      for name, seconds in self.parts.items()
      if seconds >= 0.05 or name == "training steps"
    )
    again = "" if self.launches == 1 else f" in {self.launches} launches"
    whole = f"{format_seconds(self.total)}{again}"
    return f"goodput {self.share:.0%} of {whole}: {spent}"


def measure(
  launches: Sequence[Mapping[str, Any]],
  timing: Sequence[Mapping[str, Any]],
  skipped: frozenset[int] = frozenset(),
) -> Goodput | None:
  """Where the time went; None before the first step of the first launch.

  Args:
    launches: lines of `launches.jsonl`.
    timing: lines of `timing.jsonl`; those of a run that was branched off are
      from before the first launch, and left out.
    skipped: steps that were not taken.
  """
  if not launches:
    return None
  first = launches[0]["wall_time"]
  rows = [row for row in timing if row["wall_time"] >= first]
  if not rows:
    return None
  ends = [row for row in launches if END in row]
  launches = [row for row in launches if END not in row]
  total = max(row["wall_time"] for row in rows[-1:] + ends[-1:]) - first
  sums = lambda rows, key: sum(float(row[key]) for row in rows)
  waits = {name: sums(rows, key) for key, name in WAITS.items()}
  computing = {
    row["step"]: row["seconds"] - sum(row[key] for key in WAITS) for row in rows
  }
  in_vain = sum(s for step, s in computing.items() if step in skipped)
  parts = {
    "training steps": sum(computing.values()) - in_vain,
    "skipped steps": in_vain,
    **{name: waits[name] + sums(ends, key) for key, name in WAITS.items()},
    "start-up": sums(launches, "setup"),
    "compiling": sums(launches, "compile"),
    "steps done again": sums(launches, "redone"),
    "not running": sums(launches, "down"),
  }
  parts["other"] = max(0.0, total - sum(parts.values()))
  return Goodput(
    total, parts, len(launches), int(sums(launches, "redone_steps"))
  )


def of_run(workdir: str | os.PathLike) -> Goodput | None:
  """Of the run in a folder."""
  folder = Path(workdir)
  skipped = frozenset(row["step"] for row in _rows(folder / SKIPPED))
  return measure(_rows(folder / LAUNCHES), _rows(folder / TIMING), skipped)


def _last_sign(row: Mapping[str, Any]) -> float:
  """When a launch ended, or came to its first step."""
  if END in row:
    return row["wall_time"]
  return row["wall_time"] + row["setup"] + row["compile"]


def _rows(path: Path) -> list[dict[str, Any]]:
  return read_jsonl(path) if path.exists() else []
