# SPDX-License-Identifier: Apache-2.0
"""How far each run of a sweep is: one small file in its folder."""

import dataclasses
import json
import math
import socket
import time
from pathlib import Path
from typing import Any

from moejax import runs
from moejax.config import differences
from moejax.errors import ConfigError, UserError
from moejax.files import write_atomically
from moejax.metrics import METRICS, last_row, last_step
from moejax.runlock import LOCK_FILE, PATIENCE, process_start
from moejax.sweep.sources import changed_files
from moejax.sweep.spec import PlannedRun

FILE = "sweep_state.json"

# What a run can be in; WAITING and RUNNING ones have no file that says so.
DONE, FAILED, WAITING = "done", "failed", "waiting"
# Another process trains it: that one says how it ends.
HELD = "held"


@dataclasses.dataclass(frozen=True)
class RunState:
  """What is known of a run.

  Attributes:
    state: done, failed, waiting (not started, or killed on the way) or held.
    message: why it failed, one line.
    seconds: wall time of the last attempt.
    router_files: SHA-256 by module, from `sources.router_files`; None where an
      older version has not written it.
  """

  state: str
  message: str = ""
  seconds: float = 0.0
  router_files: dict[str, str] | None = None


def read_state(folder: Path) -> RunState:
  """The state of the run in a folder; waiting if nothing says otherwise."""
  try:
    values = json.loads((folder / FILE).read_text())
    files = values["router_files"] if "router_files" in values else None
    return RunState(
      values["state"], values["message"], values["seconds"], files
    )
  except (FileNotFoundError, NotADirectoryError):
    return RunState(WAITING)
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(
      f"{folder / FILE} cannot be read ({e}); remove it, and the run is "
      "started again from its newest checkpoint"
    ) from e


def write_state(folder: Path, state: RunState) -> None:
  """Records how an attempt ended.

  Raises:
    UserError: the folder cannot be written.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(state), indent=2) + "\n"
    write_atomically(folder / FILE, text)
  except OSError as e:
    raise UserError(f"cannot write {folder / FILE}: {e.strerror or e}") from e


def has_begun(folder: Path) -> bool:
  """Whether there is a run in it, however far it is."""
  return any((folder / name).is_file() for name in (FILE, "config.json"))


def to_do(workdir: Path, planned: list[PlannedRun]) -> list[PlannedRun]:
  """The runs that are not done."""
  return [r for r in planned if read_state(workdir / r.name).state != DONE]


def how_far(workdir: Path, run: PlannedRun) -> str:
  """The state of a run for a person to read."""
  state = read_state(workdir / run.name).state
  if state == DONE and has_diverged(workdir / run.name):
    return "done, its loss is not finite"
  step = last_step(workdir / run.name / METRICS)
  if state != WAITING or not step:
    return state
  verb = "at work," if is_held(workdir / run.name) else "stopped at"
  return f"{verb} {step}/{run.config.train.num_steps}"


def has_diverged(folder: Path) -> bool:
  """Whether the last step of the run in it was taken with no finite loss."""
  last = last_row(folder / METRICS)
  if last is None:
    return False
  # A log from before steps could be skipped does not say.
  taken = "skipped" not in last or last["skipped"] == 0
  return taken and not math.isfinite(last["loss/xent"])


def is_held(folder: Path) -> bool:
  """Whether a process trains in it, as far as can be told from its lock."""
  try:
    holder = json.loads((folder / LOCK_FILE).read_text())
    touched = (folder / LOCK_FILE).stat().st_mtime
  except (OSError, ValueError):
    return False  # a lock that was given back is empty
  if holder["host"] != socket.gethostname():
    return time.time() - touched < PATIENCE
  return process_start(holder["pid"]) == holder["process_start"]


def check_same(workdir: Path, planned: list[PlannedRun]) -> None:
  """Whether the runs in the folder are those that are planned.

  Raises:
    ConfigError: a folder that has a run of other settings.
  """
  for run in planned:
    if changed := other_settings(workdir, run):
      raise ConfigError(
        f"{workdir / run.name} has a run of other settings "
        f"({'; '.join(changed[:3])}); use another --workdir, or remove that "
        "folder"
      )


def other_settings(workdir: Path, run: PlannedRun) -> list[str]:
  """How the settings of the run in the folder differ; empty without one."""
  folder = workdir / run.name
  if not (folder / "config.json").is_file():
    return []
  before: dict[str, Any] = runs.read_config(folder).to_dict()
  return differences(before, run.config.to_dict())


def check_routers(
  workdir: Path, planned: list[PlannedRun], left: list[PlannedRun]
) -> list[str]:
  """Whether routers are still what runs in the folder were made with.

  Args:
    workdir: the sweep's folder.
    planned: runs that will be compared.
    left: those of them that are to be made.

  Returns:
    Lines to print: runs that will be compared as they are.

  Raises:
    ConfigError: a point would have runs of two routers, or one run of both.
  """
  points = {run.point for run in left}
  refused: dict[str, list[str]] = {}
  noted: dict[str, list[str]] = {}
  for run in planned:
    for file in other_router(workdir, run):
      found = refused if run.point in points else noted
      found.setdefault(file, []).append(run.name)
  for file, names in refused.items():
    raise ConfigError(
      f"{', '.join(names)} in {workdir}: made with another {file} than the one "
      "there now; put that file back, use another --workdir, or remove "
      f"{'that folder' if len(names) == 1 else 'those folders'}"
    )
  return [
    f"note: {', '.join(names)}: made with another {file} than the one there now"
    for file, names in noted.items()
  ]


def other_router(workdir: Path, run: PlannedRun) -> list[str]:
  """Files of its router that have changed since the run's first step."""
  files = read_state(workdir / run.name).router_files
  if not files or not last_step(workdir / run.name / METRICS):
    return []
  return changed_files(files)
