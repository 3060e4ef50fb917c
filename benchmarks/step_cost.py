# SPDX-License-Identifier: Apache-2.0
"""Compile time and memory of the training step, by depth.

  python benchmarks/step_cost.py --config.model.scan_layers=True

Each depth is traced and compiled in turn, several times over, without the
compile cache. Memory is what XLA plans for the program, split by what is known
to be in it: state (parameters and the two moments of AdamW, donated, so held
once), gradients, and the rest: activations kept for the backward pass and
scratch. No step is run.
"""

import argparse
import dataclasses
import os
import statistics
import time

import jax

from moejax.cli import parse_config
from moejax.config import Config
from moejax.models import build, count
from moejax.runs import on_device
from moejax.step import BATCH_KEYS, init_state, make_train_step

MB = 1 << 20


def at_depth(config: Config, layers: int) -> Config:
  model = dataclasses.replace(config.model, num_layers=layers)
  return dataclasses.replace(config, model=model)


def abstract_batch(config: Config):
  shape = config.train.batch_size, config.data.seq_len
  ints = jax.ShapeDtypeStruct(shape, "int32")
  mask = jax.ShapeDtypeStruct(shape, "bool")
  return on_device({**dict.fromkeys(BATCH_KEYS, ints), "loss_mask": mask})


def compile_step(config: Config):
  """(seconds to trace and lower, seconds in XLA, the compiled step)."""
  jax.clear_caches()
  model = build(config.model)
  state = on_device(jax.eval_shape(lambda: init_state(config, model)))
  start = time.perf_counter()
  step = jax.jit(make_train_step(config, model), donate_argnums=0)
  lowered = step.lower(state, abstract_batch(config))
  middle = time.perf_counter()
  compiled = lowered.compile()
  return middle - start, time.perf_counter() - middle, compiled


def memory_line(config: Config, compiled) -> str:
  stats = compiled.memory_analysis()
  held = stats.argument_size_in_bytes
  fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
  gradients = 4 * count(config.model).num_params
  rest = stats.temp_size_in_bytes - gradients
  peak = held + fresh + stats.temp_size_in_bytes
  return (
    f"peak {peak / MB:.1f} MiB = state and batch {held / MB:.1f} + gradients "
    f"{gradients / MB:.1f} + activations and scratch {rest / MB:.1f} + other "
    f"outputs {fresh / MB:.1f}"
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/tiny.py")
  parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
  parser.add_argument("--turns", type=int, default=3)
  args, overrides = parser.parse_known_args()
  jax.config.update("jax_enable_compilation_cache", False)
  base = parse_config(args.config, overrides)
  print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
  times: dict[int, list] = {layers: [] for layers in args.layers}
  compiled = {}
  for turn in range(args.turns + 1):
    for layers in args.layers:
      *seconds, compiled[layers] = compile_step(at_depth(base, layers))
      if turn:  # the first turn warms up Python and LLVM
        times[layers].append(seconds)
  medians = {
    n: [statistics.median(part) for part in zip(*seconds)]
    for n, seconds in times.items()
  }
  first = sum(medians[args.layers[0]])
  for layers, (trace, xla) in medians.items():
    print(
      f"{layers:>3} layers: trace {trace:.2f} s, XLA {xla:.2f} s, together "
      f"{(trace + xla) / first:.2f} of {args.layers[0]} layers; "
      + memory_line(at_depth(base, layers), compiled[layers])
    )
  print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
  main()
