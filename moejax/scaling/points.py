# SPDX-License-Identifier: Apache-2.0
"""What is fitted: size, tokens, compute and loss of finished runs.

Suffix: `P` points.
"""

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from moejax.config import Config, differences
from moejax.errors import DataError
from moejax.report.rundata import (
  ALIKE,
  RunData,
  load_run_data,
  other_text,
)
from moejax.scaling.laws import SIX_ND, ComputeLaw
from moejax.scaling.lengths import tokens_and_flops
from moejax.scaling.sizes import SIZE_OPTIONS

# N as the table's column of it is called.
COUNTS = {"active": "active_params", "non-embedding": "non_embedding_params"}
VALIDATION, VALIDATED = "validation/xent", "validation/tokens"

# What changes no loss by itself, or is repeated on purpose; what was validated
# on is compared as tokens.
_MAY_DIFFER = (
  "checkpoint.", "parallel.", "eval.every", "eval.num_batches",
  "eval.batch_size", "eval.sample_", "seed", "data.store", "data.num_workers",
  "data.prefetch_rows", "data.timeout", "model.remat", "model.attention",
  "model.moe.dispatch", "model.moe.matmul", "model.scan_layers",
  "train.accumulation_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Points:
  """Finished runs.

  Attributes:
    names: of each.
    params: N, parameters a token uses, [P].
    tokens: D, [P].
    flops: C, [P].
    loss: nats per token on held-out text, [P].
    notes: what a reader of the fit should know.
  """

  names: tuple[str, ...]
  params: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.names)


def read_points(paths: list[str], params: str = "active") -> Points:
  """Points of runs' folders and of tables (.csv, .json), in this order.

  A table has the columns active_params, tokens, loss, and may have name and
  flops (else 6 N D, and a note says so). Of a run: the parameters and FLOPs
  that its config.json has, all tokens of its steps, and the validation loss of
  its last step.

  Args:
    paths: folders and files.
    params: what N counts, `active` or `non-embedding` (a table then needs the
      column non_embedding_params).

  Raises:
    DataError: a run that is not finished or not validated at its end, runs on
      other data or validated on other tokens, a table that is damaged or lacks
      a column, a path or a point twice, which would narrow the intervals.
  """
  _require_once(paths)
  rows, runs, notes = [], [], []
  files = [path for path in map(Path, paths) if _is_table(path)]
  names = _names([path for path in map(Path, paths) if path not in files])
  for path in map(Path, paths):
    if path in files:
      table = _read_table(path, COUNTS[params])
      missing = sum(row["flops"] is None for row in table)
      if missing:
        notes.append(f"{path}: {missing} points without flops count as 6 N D")
      rows += [row | {"where": f"{row['name']} of {path}"} for row in table]
    else:
      run = dataclasses.replace(load_run_data(path), name=names[path])
      runs.append(run)
      rows.append(_point_of(run, path, params) | {"where": str(path)})
  notes += _check_comparable(runs)
  numbers = {
    key: np.array([row[key] for row in rows], float)
    for key in ("params", "tokens", "flops", "loss")
  }
  flops = np.where(
    np.isnan(numbers["flops"]),
    SIX_ND.flops(numbers["params"], numbers["tokens"]),
    numbers["flops"],
  )
  numbers["flops"] = flops
  _require_distinct(rows, np.stack(list(numbers.values()), axis=1))
  names = tuple(row["name"] for row in rows)
  return Points(names, **numbers, notes=tuple(notes))


def compute_law(points: Points) -> tuple[ComputeLaw, float]:
  """C = K N^p D through the points, and its largest relative error.

  Least squares of ln(C / (N D)) over ln N; p is 1 where all sizes are one.
  """
  x = np.log(points.params)
  y = np.log(points.flops) - x - np.log(points.tokens)
  slope = 0.0
  if np.ptp(x) > 0:
    slope = float((x - x.mean()) @ y / ((x - x.mean()) @ (x - x.mean())))
  law = ComputeLaw(float(np.exp(y.mean() - slope * x.mean())), 1 + slope)
  ratio = law.flops(points.params, points.tokens) / points.flops
  return law, float(np.abs(ratio - 1).max())


def to_csv(points: Points, count: str = "active") -> str:
  """A table that `read_points` reads again, with the same count of N."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(["name", COUNTS[count], "tokens", "flops", "loss"])
  columns = (points.params, points.tokens, points.flops, points.loss)
  for name, *numbers in zip(points.names, *columns):
    writer.writerow([name, *(repr(float(x)) for x in numbers)])
  return out.getvalue()


def _require_once(paths: list[str]) -> None:
  """No folder or table twice, however it is written."""
  seen: dict[Path, str] = {}
  for path in paths:
    whole = Path(path).resolve()
    if whole in seen:
      raise DataError(
        f"{seen[whole]} and {path} are one path; points count once: leave one "
        "out"
      )
    seen[whole] = path


def _require_distinct(rows: list[dict[str, Any]], numbers: np.ndarray) -> None:
  """Two runs never end at the same loss to the last digit."""
  seen: dict[tuple[float, ...], str] = {}
  for row, values in zip(rows, map(tuple, numbers.tolist())):
    if values in seen:
      raise DataError(
        f"{seen[values]} and {row['where']} are one point: size, tokens, FLOPs "
        "and loss are the same to the last digit; leave one out (or give "
        "losses that were rounded more digits)"
      )
    seen[values] = row["where"]


def _is_table(path: Path) -> bool:
  return path.suffix in (".csv", ".json") and not path.is_dir()


def _names(folders: list[Path]) -> dict[Path, str]:
  """Their own, or paths where several have one, as a sweep's `seed_0`."""
  whole = {folder: folder.resolve() for folder in folders}
  if len({path.name for path in whole.values()}) == len(whole):
    return {folder: path.name for folder, path in whole.items()}
  start = os.path.commonpath([path.parent for path in whole.values()])
  return {f: path.relative_to(start).as_posix() for f, path in whole.items()}


def _point_of(run: RunData, path: Path, params: str) -> dict[str, Any]:
  """One finished run as a row."""
  config = run.record["config"]
  steps = config["train"]["num_steps"]
  if run.last_step < steps:
    raise DataError(
      f"{path} is at step {run.last_step} of {steps}; finish it with moejax "
      f"train --workdir={path}, or leave it out"
    )
  evaluations = run.evaluations
  if VALIDATION not in evaluations or VALIDATED not in evaluations:
    raise DataError(f"{path} has no validation loss; train with eval.every > 0")
  if evaluations.steps[-1] != steps:
    raise DataError(
      f"{path} was not validated at its last step {steps}, only at "
      f"{evaluations.steps[-1]}; leave it out, or train it again"
    )
  model = config["model"]
  try:
    found = {
      "params": run.record["num_active_params"],
      "loss": float(evaluations[VALIDATION][-1]),
    } | _length_of(run.record)  # fmt: skip
    if params == "non-embedding":
      table = model["vocab_size"] * model["d_model"]
      found["params"] -= table * (1 if model["tie_embeddings"] else 2)
  except KeyError as e:
    raise DataError(
      f"{path}/config.json is not what a run writes: no {e}"
    ) from e
  if not math.isfinite(found["loss"]):
    raise DataError(
      f"{path}: its validation loss is {found['loss']}; leave it out"
    )
  return found | {"name": run.name}


def _length_of(record: dict[str, Any]) -> dict[str, float]:
  """Tokens and FLOPs of the run that a config.json is of."""
  config = record["config"]
  if config["train"]["phases"]:
    tokens, flops = tokens_and_flops(Config.from_dict(config))
    return {"tokens": tokens, "flops": flops}
  tokens = config["train"]["num_steps"] * config["train"]["batch_size"]
  tokens *= config["data"]["seq_len"]
  return {"tokens": tokens, "flops": record["flops_per_token"] * tokens}


def _check_comparable(runs: list[RunData]) -> list[str]:
  """Refuses other data; a note for what else differs beside the size."""
  if not runs:
    return []
  first, keys = runs[0], set()
  _check_validated(runs)
  for run in runs[1:]:
    old, new = first.record["config"], run.record["config"]
    differ = other_text(old["data"], new["data"])
    if not differ and old["data"]["weights"] != new["data"]["weights"]:
      differ = f"weights ({old['data']['weights']}, {new['data']['weights']})"
    if differ:
      raise DataError(
        f"{first.name} and {run.name} differ in data.{differ}; their losses "
        "cannot be compared: fit them apart"
      )
    changed = (line.split(": ")[0] for line in differences(old, new))
    keys |= {
      key
      for key in changed
      if key not in SIZE_OPTIONS and not key.startswith(_MAY_DIFFER)
    }
  if not keys:
    return []
  return [
    f"the runs differ in more than size and length: {', '.join(sorted(keys))}"
  ]


def _check_validated(runs: list[RunData]) -> None:
  """Refuses losses of longer and shorter beginnings of the validation text."""
  tokens = {run.name: run.evaluations[VALIDATED][-1] for run in runs}
  few, many = min(tokens, key=tokens.get), max(tokens, key=tokens.get)
  if tokens[many] > (1 + ALIKE) * tokens[few]:
    raise DataError(
      f"{few} and {many} were validated on {tokens[few]:,.0f} and "
      f"{tokens[many]:,.0f} tokens (eval.num_batches, eval.batch_size); their "
      "losses cannot be compared: fit them apart, or measure them alike with "
      "moejax eval and give a table"
    )


def _read_table(path: Path, params_column: str) -> list[dict[str, Any]]:
  try:
    text = path.read_text(encoding="utf-8")
  except FileNotFoundError:
    raise DataError(f"no table {path}") from None
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"{path} cannot be read: {e}") from e
  if path.suffix == ".json":
    rows = _json_rows(path, text)
  else:
    rows = list(csv.DictReader(io.StringIO(text)))
  if not rows:
    raise DataError(f"{path} has no points")
  return [
    {
      "name": str(row["name"]) if "name" in row else f"{path.stem}-{i}",
      "params": _number(row, params_column, path, i),
      "tokens": _number(row, "tokens", path, i),
      "loss": _number(row, "loss", path, i),
      "flops": _number(row, "flops", path, i)
      if "flops" in row and row["flops"] not in (None, "")
      else None,
    }
    for i, row in enumerate(rows, 1)
  ]


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
  try:
    rows = json.loads(text)
  except json.JSONDecodeError as e:
    raise DataError(f"{path} is no JSON: {e}") from e
  if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
    raise DataError(
      f"{path} is no list of points such as "
      '[{"active_params": 1e6, "tokens": 1e7, "loss": 3.2}]'
    )
  return rows


def _number(row: dict[str, Any], key: str, path: Path, i: int) -> float:
  """A finite positive number of a table's row `i`, counted from 1."""
  if key not in row:
    raise DataError(
      f"{path} has no column {key}; it needs {key}, tokens and loss, and may "
      "have name and flops"
    )
  try:
    value = float(row[key])
  except (TypeError, ValueError):
    raise DataError(
      f"{path}, point {i}: {key}={row[key]!r} is no number"
    ) from None
  if not (math.isfinite(value) and value > 0):
    raise DataError(f"{path}, point {i}: {key}={row[key]} must be positive")
  return value
