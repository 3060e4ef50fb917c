# SPDX-License-Identifier: Apache-2.0
"""Synthetic run folders, written through the real log writer."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from moejax.config import Config
from moejax.goodput import record_launch
from moejax.metrics import RunLog

STARTED = 1.7636e9
SOURCE = "<b>texts"
# Source and row of each row of a skipped batch.
ROWS = np.array([[0, 7 * i] for i in range(11)] + [[5, 3]])


@dataclasses.dataclass
class Recipe:
  """What a synthetic run holds."""

  steps: int = 40
  done: int = 40
  layers: int = 2
  experts: int = 4
  moe: bool = True
  evaluations: bool = True
  timing: bool = True
  samples: tuple[str, ...] = ("x = 1\n",)
  loss_at: dict[int, float] = dataclasses.field(default_factory=dict)
  pattern: tuple[str, ...] = ()
  validated: float = 16384.0
  luck: float = 0.0  # of a seed, on the validation loss
  skipped: dict[int, int] | None = None  # reason by step
  phased: bool = False

  def config(self) -> Config:
    pattern = self.pattern or (
      "attention/moe" if self.moe else "attention/mlp",
    )
    return Config.from_dict({
      "model": {
        "num_layers": self.layers * len(pattern),
        "pattern": pattern,
        "moe": {"num_experts": self.experts, "router": "top_k(k=2)"},
      },
      "optimizer": {
        "learning_rate": 0.003,
        "schedule": {"warmup": 0.1, "decay": 0.2},
      },
      "data": {"sources": (SOURCE,)},
      "train": {"num_steps": self.steps},
    })  # fmt: skip


def loss(step: int) -> float:
  return 2.0 + 4.0 * float(np.exp(-step / 8))


def write_run(folder: Path, recipe: Recipe) -> Path:
  """A run's folder as training leaves it."""
  folder.mkdir(parents=True)
  config = recipe.config()
  record = {
    "config": config.to_dict(), "versions": {"jax": "0.10.2"},
    "git_commit": "0123456789abcdef", "num_params": 12_300_000,
    "num_active_params": 4_560_000, "flops_per_token": 2.7e7,
    "run": {"platform": "cpu", "device": "cpu", "devices": 1},
  }  # fmt: skip
  (folder / "config.json").write_text(json.dumps(record))
  if recipe.timing:
    record_launch(folder, 0, STARTED - 15, setup=1.0, compiling=4.0)
  with RunLog(folder, 0) as log:
    for step in range(1, recipe.done + 1):
      log.step(step, _metrics(recipe, step))
      if recipe.skipped and step in recipe.skipped:
        log.skipped(step, recipe.skipped[step], ROWS)
      if recipe.timing:
        log.timing(step, _timing(step))
      if recipe.moe and (step == 1 or step % 5 == 0):
        log.load(step, load(recipe, step))
      if recipe.evaluations and step % 20 == 0:
        log.evaluation(step, {
          "validation/xent": loss(step) + 0.1 + recipe.luck,
          "validation/perplexity": np.exp(loss(step) + 0.1),
          "validation/bits_per_byte": 1.5 + 1 / step,
          "validation/tokens": recipe.validated,
        })  # fmt: skip
        for text in recipe.samples:
          log.sample(step, "def f():\n", text)
  return folder


def load(recipe: Recipe, step: int) -> np.ndarray:
  """[L, E] shares that get even with time."""
  raw_E = 1.0 + np.arange(recipe.experts) * 4.0 / step
  return np.tile(raw_E / raw_E.sum(), (recipe.layers, 1)).astype(np.float32)


def _metrics(recipe: Recipe, step: int) -> dict:
  value = recipe.loss_at[step] if step in recipe.loss_at else loss(step)
  rate = 0.003 * min(1.0, step / 4)
  found = {
    "loss/xent": value, "loss/total": value + 0.01, "loss/z": 30.0 / step,
    "learning_rate": rate, "grad_norm": 3.0 / step, "tokens": 512 * step,
  }  # fmt: skip
  if recipe.skipped is not None:
    reason = recipe.skipped[step] if step in recipe.skipped else 0
    found |= {"skipped": reason, "param_norm": 9.0 + 1 / step}
  if recipe.phased:
    found |= {"phase": int(step > 20), "batch_digest": step * 977}
  if recipe.moe:
    found |= {
      "loss/balance": 1 + 1 / step, "loss/router_z": 2.0 + 1 / step,
      "router/entropy": 0.9 - 0.001 * step, "router/dropped": 0.0,
      "router/max_over_mean": 1 + 2 / step,
    }  # fmt: skip
  return found


def _timing(step: int) -> dict:
  seconds = 0.5 if step > 1 else 10.0
  return {
    "seconds": seconds, "tokens_per_second": 512 / seconds,
    "model_flops_per_second": 512 / seconds * 2.7e7, "input_wait": 0.05,
    "checkpoint": 0.0, "evaluation": 0.1 if step % 20 == 0 else 0.0,
    "wall_time": STARTED + step,
  }  # fmt: skip
