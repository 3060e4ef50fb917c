# SPDX-License-Identifier: Apache-2.0
"""What a run wrote, as arrays: the only part of the report that reads files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moejax import goodput, metrics
from moejax.config import Config
from moejax.errors import ConfigError, DataError
from moejax.goodput import Goodput

# Losses on other text, or on other tokens of it, cannot be compared.
TEXT_OPTIONS = ("sources", "text_key", "tokenizer", "validation_fraction")
ALIKE = 0.01  # of validated tokens: rows of other lengths end elsewhere


def other_text(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
  """`option (theirs, others)` of two configs' data sections, or empty."""
  for key in TEXT_OPTIONS:
    # JSON has no tuples.
    a, b = (tuple(x) if isinstance(x, list) else x
            for x in (first[key], other[key]))  # fmt: skip
    if a != b:
      return f"{key} ({a!r}, {b!r})"
  return ""


@dataclasses.dataclass(frozen=True)
class Table:
  """Numbers of one log: `columns[key][i]` belongs to `steps[i]`."""

  steps: np.ndarray
  columns: dict[str, np.ndarray]

  @classmethod
  def of(cls, rows: list[dict[str, Any]]) -> "Table":
    """Columns of all numeric keys; NaN in rows without the key."""
    keys = {k for row in rows for k, v in row.items() if _is_number(v)}
    columns = {
      key: np.array([row[key] if key in row else np.nan for row in rows], float)
      for key in sorted(keys - {"step"})
    }
    return cls(np.array([row["step"] for row in rows], int), columns)

  def __len__(self) -> int:
    return len(self.steps)

  def __contains__(self, key: str) -> bool:
    return key in self.columns

  def __getitem__(self, key: str) -> np.ndarray:
    return self.columns[key]


@dataclasses.dataclass(frozen=True)
class RunData:
  """A run's folder.

  Attributes:
    name: name of the folder.
    record: config.json: config, versions, git_commit, sizes.
    config: the parsed config; None if this version cannot read it.
    metrics: training metrics by step; at least one row.
    timing: seconds and rates by step.
    evaluations: validation metrics by step.
    load_steps: steps of `loads`, int [S].
    loads: share of each layer's assignments by expert, [S, L, E]; S may be 0.
    samples: rows with step, prompt, text.
    skipped: rows with step, reason, rows, of the steps that were not taken.
    goodput: where the time went, as far as it is known.
  """

  name: str
  record: dict[str, Any]
  config: Config | None
  metrics: Table
  timing: Table
  evaluations: Table
  load_steps: np.ndarray
  loads: np.ndarray
  samples: list[dict[str, Any]]
  skipped: list[dict[str, Any]]
  goodput: Goodput | None = None

  @property
  def num_steps(self) -> int:
    return self.record["config"]["train"]["num_steps"]

  @property
  def last_step(self) -> int:
    return int(self.metrics.steps[-1])

  @property
  def moe_layers(self) -> list[int]:
    """Index in the whole stack of each layer of `loads`."""
    L = self.loads.shape[1]
    if self.config is not None:
      layers = self.config.model.layers
      found = [
        i for i, layer in enumerate(layers) for _ in range(layer.num_routers)
      ]
      if len(found) == L:
        return found
    return list(range(L))


def load_run_data(workdir: Path) -> RunData:
  """Reads a run's folder, also of a run that is still going on.

  Raises:
    DataError: no run there, no finished step yet, or a damaged config.json.
  """
  record = _read_record(workdir)
  rows = {
    name: metrics.read_jsonl(workdir / name)
    if (workdir / name).exists()
    else []
    for name in metrics.FILES
  }
  if not rows[metrics.METRICS]:
    raise DataError(
      f"{workdir} has no finished step in {metrics.METRICS} yet; wait for the "
      "run's first steps"
    )
  try:
    config = Config.from_dict(record["config"])
  except ConfigError:
    config = None  # written by another version: report what needs no config
  load_steps, loads = _stack_loads(rows[metrics.LOAD])
  return RunData(
    name=workdir.resolve().name,
    record=record,
    config=config,
    metrics=Table.of(rows[metrics.METRICS]),
    timing=Table.of(rows[metrics.TIMING]),
    evaluations=Table.of(rows[metrics.EVALUATION]),
    load_steps=load_steps,
    loads=loads,
    samples=[row for row in rows[metrics.SAMPLES] if "text" in row],
    skipped=rows[metrics.SKIPPED],
    goodput=goodput.of_run(workdir),
  )


def _read_record(workdir: Path) -> dict[str, Any]:
  path = workdir / "config.json"
  try:
    record = json.loads(path.read_text())
  except FileNotFoundError:
    raise DataError(
      f"{workdir} is not the folder of a run: it has no config.json"
    ) from None
  except (OSError, ValueError) as e:
    raise DataError(f"{path} cannot be read: {e}") from e
  try:
    record["config"]["train"]["num_steps"], record["num_params"]
    record["num_active_params"], record["versions"], record["git_commit"]
  except (KeyError, TypeError) as e:
    raise DataError(f"{path} is not what a run writes: no {e}") from e
  return record


def _stack_loads(rows: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
  """Steps [S] and loads [S, L, E] of the rows shaped like the last."""
  arrays = [np.array(row["load"], float) for row in rows if "load" in row]
  if not arrays or arrays[-1].ndim != 2:
    return np.zeros(0, int), np.zeros((0, 0, 0))
  shape = arrays[-1].shape
  kept = [
    (row["step"], array)
    for row, array in zip((r for r in rows if "load" in r), arrays)
    if array.shape == shape
  ]
  return np.array([s for s, _ in kept], int), np.stack([a for _, a in kept])


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)
