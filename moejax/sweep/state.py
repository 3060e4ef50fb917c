# SPDX-License-Identifier: Apache-2.0
"""How far each run of a sweep is: one small file in its folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from moejax import runs
from moejax.config import differences
from moejax.errors import ConfigError, UserError
from moejax.files import write_atomically
from moejax.sweep.spec import PlannedRun

FILE = "sweep_state.json"

# What a run can be in; WAITING and RUNNING ones have no file that says so.
DONE, FAILED, WAITING = "done", "failed", "waiting"


@dataclasses.dataclass(frozen=True)
class RunState:
  """What is known of a run.

  Attributes:
    state: done, failed or waiting (not started, or killed on the way).
    message: why it failed, one line.
    seconds: wall time of the last attempt.
  """

  state: str
  message: str = ""
  seconds: float = 0.0


def read_state(folder: Path) -> RunState:
  """The state of the run in a folder; waiting if nothing says otherwise."""
  try:
    values = json.loads((folder / FILE).read_text())
    return RunState(values["state"], values["message"], values["seconds"])
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


def to_do(workdir: Path, planned: list[PlannedRun]) -> list[PlannedRun]:
  """The runs that are not done."""
  return [r for r in planned if read_state(workdir / r.name).state != DONE]


def check_same(workdir: Path, planned: list[PlannedRun]) -> None:
  """Whether the runs in the folder are those that are planned.

  Raises:
    ConfigError: a folder that has a run of other settings.
  """
  for run in planned:
    if (workdir / run.name / "config.json").is_file():
      _check_same(workdir / run.name, run)


def _check_same(folder: Path, run: PlannedRun) -> None:
  before: dict[str, Any] = runs.read_config(folder).to_dict()
  changed = differences(before, run.config.to_dict())
  if changed:
    raise ConfigError(
      f"{folder} has a run of other settings ({'; '.join(changed[:3])}); use "
      "another --workdir, or remove that folder"
    )
