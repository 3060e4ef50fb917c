# SPDX-License-Identifier: Apache-2.0
"""What watching routers costs beside the plain forward pass.

  python benchmarks/analysis.py --tokens=1000000

The model is untrained and the text drawn at random, so each expert gets its
share. In each turn both read the same batches: the plain pass computes all
layers and the likeliest next tokens; the analysis adds each token's choices,
the sums by expert, pair and domain, and the counts by token id.
"""

import argparse
import functools
import os
import statistics
import time

import jax
import numpy as np

from moejax.analysis import counts
from moejax.analysis.checkpoints import router_names
from moejax.cli import parse_config
from moejax.hardware import keep_freed_memory
from moejax.models import Rows, build, init_variables
from moejax.step import device_batch

BATCH_TOKENS = 4096


@functools.partial(jax.jit, static_argnums=0)
def plain(model, variables, batch):
  """The likeliest next tokens."""
  rows = Rows(batch["segment_ids"], batch["positions"])
  output = model.apply(variables, batch["tokens"], rows)
  return counts.predicted_tokens(model, variables, output.hidden_BTD)


def batches(config, model, number):
  rng = np.random.default_rng(0)
  T = config.data.seq_len
  shape = max(1, BATCH_TOKENS // T), T
  for _ in range(number):
    tokens = rng.integers(0, config.model.vocab_size, (*shape[:1], T + 1))
    ones = np.ones(shape, np.int32)
    batch = {
      "tokens": tokens[:, :-1].astype(np.int32),
      "targets": tokens[:, 1:].astype(np.int32),
      "segment_ids": ones, "loss_mask": ones > 0,
      "positions": np.broadcast_to(np.arange(T, dtype=np.int32), shape),
    }  # fmt: skip
    yield device_batch(batch, model.placement)


def forward_seconds(config, model, variables, number):
  start = time.perf_counter()
  last = None
  for batch in batches(config, model, number):
    result = plain(model, variables, batch)
    jax.block_until_ready(last)  # one behind, as the analysis fetches
    last = result
  jax.block_until_ready(last)
  return time.perf_counter() - start


def analysis_seconds(config, model, variables, number):
  L, E = len(router_names(config.model)), config.model.moe.num_experts
  tally = counts.zero_tally(L, E)
  words = counts.Words.empty(config.model.vocab_size, L, E)
  start = time.perf_counter()
  last = None
  for batch in batches(config, model, number):
    tally, words, entropy_L, _ = counts.add_batch(
      model, variables, batch, tally, words
    )
    jax.block_until_ready(last)
    last = entropy_L
  jax.block_until_ready((last, words))
  return time.perf_counter() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/tiny.py")
  parser.add_argument("--tokens", type=int, default=1_000_000)
  parser.add_argument("--turns", type=int, default=5)
  args, overrides = parser.parse_known_args()
  keep_freed_memory()
  config = parse_config(args.config, overrides)
  model = build(config.model)
  variables = init_variables(model, jax.random.key(0))
  rows = max(1, BATCH_TOKENS // config.data.seq_len)
  number = max(1, args.tokens // args.turns // (rows * config.data.seq_len))
  tokens = number * rows * config.data.seq_len
  print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
  tasks = {"forward": forward_seconds, "analysis": analysis_seconds}
  for task in tasks.values():
    task(config, model, variables, 2)  # compiles
  times = {name: [] for name in tasks}
  for _ in range(args.turns):
    for name, task in tasks.items():
      times[name].append(task(config, model, variables, number))
  medians = {name: statistics.median(x) for name, x in times.items()}
  for name, seconds in medians.items():
    print(
      f"{name:<10} {tokens / seconds:>9,.0f} tokens/s, a million in "
      f"{1e6 / tokens * seconds:.1f} s"
    )
  ratios = [a / f for a, f in zip(times["analysis"], times["forward"])]
  print(
    f"analysis / forward {statistics.median(ratios):.2f} "
    f"({min(ratios):.2f} to {max(ratios):.2f})"
  )
  print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
  main()
