# SPDX-License-Identifier: Apache-2.0
"""Where a run's time goes, from its first start on: `launches.jsonl`.

One line each time the run is started or goes on, never cut: when, how long it
took to get to its first step, what the launch before had done in vain, and how
long nothing ran. With the lines of `timing.jsonl` that gives goodput: the share
of the whole time in which steps were computed that count.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moejax.metrics import TIMING, encode_line, read_jsonl
from moejax.progress import format_seconds

LAUNCHES = "launches.jsonl"
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
      + [_first_step(row) for row in launches[-1:]],
      default=began,
    )
  line = encode_line(
    step,
    {
      "wall_time": began, "setup": setup, "compile": compiling,
      "redone_steps": len(redone), "redone": sum(redone),
      "down": max(0.0, began - stopped),
    },
    single=False,
  )  # fmt: skip
  try:
    with open(path, "ab") as f:
      f.write(line)
      f.flush()
      os.fsync(f.fileno())
  except OSError as e:
    logger.warning("cannot write %s: %s", path, e.strerror or e)


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Seconds of a run, from its first launch to its last step.

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
  launches: Sequence[Mapping[str, Any]], timing: Sequence[Mapping[str, Any]]
) -> Goodput | None:
  """Where the time went; None before the first step of the first launch.

  Args:
    launches: lines of `launches.jsonl`.
    timing: lines of `timing.jsonl`; those of a run that was branched off are
      from before the first launch, and left out.
  """
  if not launches:
    return None
  first = launches[0]["wall_time"]
  rows = [row for row in timing if row["wall_time"] >= first]
  if not rows:
    return None
  total = rows[-1]["wall_time"] - first
  sums = lambda rows, key: sum(float(row[key]) for row in rows)
  waits = {name: sums(rows, key) for key, name in WAITS.items()}
  parts = {
    "training steps": sums(rows, "seconds") - sum(waits.values()),
    **waits,
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
  return measure(_rows(folder / LAUNCHES), _rows(folder / TIMING))


def _first_step(launch: Mapping[str, Any]) -> float:
  return launch["wall_time"] + launch["setup"] + launch["compile"]


def _rows(path: Path) -> list[dict[str, Any]]:
  return read_jsonl(path) if path.exists() else []
