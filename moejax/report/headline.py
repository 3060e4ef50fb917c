# SPDX-License-Identifier: Apache-2.0
"""The report's numbers in words: tiles, status line, tables."""

import dataclasses
import datetime
from typing import Any

import numpy as np

from moejax.config import Config, describe_options
from moejax.progress import format_count, format_seconds
from moejax.report.charts import last_mean, percent
from moejax.report.curves import median_rate
from moejax.report.rundata import RunData
from moejax.report.series import finite
from moejax.report.skipped import divergence, how_many


@dataclasses.dataclass(frozen=True)
class Tile:
  """One headline number."""

  label: str
  value: str
  detail: str = ""


def tiles(run: RunData) -> list[Tile]:
  """The numbers that a reader looks for first."""
  found = [_train_tile(run), *_evaluation_tiles(run), _size_tile(run)]
  if "tokens" in run.metrics:
    tokens = run.metrics["tokens"][-1]
    share = tokens / run.record["num_active_params"]
    found.append(
      Tile("tokens seen", format_count(tokens),
           f"{format_count(share)} per active parameter")
    )  # fmt: skip
  found += _speed_tiles(run)
  return found


def _train_tile(run: RunData) -> Tile:
  key = "loss/xent" if "loss/xent" in run.metrics else "loss/total"
  if key not in run.metrics:
    return Tile("training loss", "–")
  value = last_mean(run.metrics.steps, run.metrics[key])
  return Tile("training loss", f"{value:.3f}", "nats per token")


def _evaluation_tiles(run: RunData) -> list[Tile]:
  found = []
  for key, label in (
    ("validation/xent", "validation loss"),
    ("validation/bits_per_byte", "bits per byte"),
  ):
    if key in run.evaluations:
      x, y = finite(run.evaluations.steps, run.evaluations[key])
      if len(y):
        found.append(Tile(label, f"{y[-1]:.3f}", f"at step {x[-1]:,}"))
  return found


def _size_tile(run: RunData) -> Tile:
  total = run.record["num_params"]
  active = run.record["num_active_params"]
  detail = f"{format_count(active)} active"
  return Tile("parameters", format_count(total), detail)


def _speed_tiles(run: RunData) -> list[Tile]:
  found = []
  rate = median_rate(run, "tokens_per_second")
  if rate is not None:
    found.append(Tile("tokens per second", format_count(rate), "median"))
  mfu = median_rate(run, "mfu")
  flops = median_rate(run, "model_flops_per_second")
  if mfu is not None:
    found.append(Tile("MFU", percent(mfu), "of peak FLOP/s"))
  elif flops is not None:
    found.append(Tile("model FLOP/s", format_count(flops), "median"))
  if "seconds" in run.timing:
    seconds = float(np.nansum(run.timing["seconds"]))
    found.append(Tile("time", format_seconds(seconds), "of all its steps"))
  return found


def status(run: RunData) -> tuple[str, str]:
  """One word for how the run stands, and a sentence."""
  where = f"step {run.last_step:,} of {run.num_steps:,}"
  diverged = divergence(run)
  if diverged is not None:
    return "diverged", f"{where}; {diverged}"
  if run.last_step >= run.num_steps:
    plural = "" if run.num_steps == 1 else "s"
    return "finished", f"{run.num_steps:,} step{plural}"
  return "not finished", f"{where} when this page was written"


def facts(run: RunData) -> list[str]:
  """Short facts under the run's name."""
  found = []
  if (skipped := how_many(run)) is not None:
    found.append(skipped)
  model = run.record["config"]["model"]
  if run.config is not None and run.loads.size:
    experts = run.config.model.moe
    found.append(
      f"{model['num_layers']} layers, {experts.num_experts} experts each, "
      f"{experts.router}"
    )
  elif "num_layers" in model:
    found.append(f"{model['num_layers']} layers")
  device = run.record["run"] if "run" in run.record else {}
  if "device" in device and "devices" in device:
    found.append(f"{device['devices']} × {device['device']}")
  if "wall_time" in run.timing:
    last = float(run.timing["wall_time"][-1])
    if np.isfinite(last):
      when = datetime.datetime.fromtimestamp(last, datetime.UTC)
      found.append(f"{when:%Y-%m-%d %H:%M} UTC")
  if run.record["git_commit"]:
    commit = str(run.record["git_commit"])
    dirty = "-dirty" if commit.endswith("-dirty") else ""
    found.append(f"commit {commit[:10]}{dirty}")
  return found


def options(run: RunData) -> list[tuple[str, str, str, bool]]:
  """The resolved config: path, value, meaning, whether not the default."""
  documented = {}
  for line in describe_options():
    head, _, doc = line.partition("  ")
    documented[head.partition("=")[0]] = doc
  defaults = dict(_leaves(_plain(Config().to_dict())))
  rows = []
  for path, value in _leaves(run.record["config"]):
    changed = path not in defaults or defaults[path] != value
    doc = documented[path] if path in documented else ""
    rows.append((path, _show(value), doc, changed))
  return rows


def _plain(value: Any) -> Any:
  """Tuples as the lists that JSON makes of them."""
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  return list(value) if isinstance(value, tuple) else value


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  found = []
  for key, value in tree.items():
    if isinstance(value, dict):
      found += _leaves(value, f"{prefix}{key}.")
    else:
      found.append((prefix + key, value))
  return found


def _show(value: Any) -> str:
  if isinstance(value, list):
    return ", ".join(map(str, value)) if value else "none"
  return '""' if value == "" else str(value)
