# SPDX-License-Identifier: Apache-2.0
"""What it costs that a step may be skipped.

  python benchmarks/skipped_steps.py --turns 15

Times three training steps in turn: as it is, with a branch around the update;
with the spike guard's window as well (`stability.spike`); and without the
branch, as if every step were taken.
"""

import argparse
import dataclasses
import os
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from moejax.cli import parse_config
from moejax.config import Config
from moejax.hardware import keep_freed_memory
from moejax.models import build
from moejax.step import BATCH_KEYS, init_state, make_train_step


def batch_of(config: Config):
  shape = config.train.batch_size, config.data.seq_len
  row = np.random.default_rng(0).integers(3, 256, shape)
  ones = jnp.ones(shape, jnp.int32)
  batch = dict.fromkeys(BATCH_KEYS, ones) | {
    "tokens": jnp.asarray(row, jnp.int32),
    "targets": jnp.asarray(np.roll(row, -1, 1), jnp.int32),
    "positions": jnp.tile(jnp.arange(shape[1]), (shape[0], 1)),
    "source_ids": ones - 1,
    "loss_mask": ones > 0,
  }
  return batch


def timed_step(config: Config, branch: bool):
  """A callable that does one step and returns its seconds."""
  model, batch = build(config.model), batch_of(config)
  state = jax.jit(lambda: init_state(config, model))()
  step = jax.jit(make_train_step(config, model), donate_argnums=0)
  always = lambda taken, take, leave, state: take(state)
  cond = jax.lax.cond if branch else always
  with mock.patch("moejax.step.jax.lax.cond", cond):
    step = step.lower(state, batch).compile()

  def run() -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start

  return run


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/tiny.py")
  parser.add_argument("--turns", type=int, default=15)
  args, overrides = parser.parse_known_args()
  keep_freed_memory()
  config = parse_config(args.config, overrides)
  guarded = dataclasses.replace(
    config, stability=dataclasses.replace(config.stability, spike=6.0)
  )
  steps = {
    "branch": timed_step(config, True),
    "branch and window": timed_step(guarded, True),
    "no branch": timed_step(config, False),
  }
  print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
  times: dict[str, list[float]] = {name: [] for name in steps}
  for turn in range(args.turns + 2):
    for name, run in steps.items():
      seconds = [run() for _ in range(5)]
      if turn > 1:
        times[name].append(statistics.median(seconds))
  medians = {name: statistics.median(found) for name, found in times.items()}
  for name, seconds in medians.items():
    ratios = [a / b for a, b in zip(times[name], times["no branch"])]
    print(
      f"{name:<18} {1e3 * seconds:7.1f} ms a step, "
      f"{statistics.median(ratios):.3f} of no branch "
      f"({min(ratios):.3f} to {max(ratios):.3f})"
    )
  print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
  main()
