# SPDX-License-Identifier: Apache-2.0
"""`moejax replay`: one step of a run again, layer by layer, to look at it."""

import argparse
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import data as data_lib
from moejax import losses, runs
from moejax.checkpoint import CheckpointReader
from moejax.config import Config, ParallelConfig, Phase, phase_at
from moejax.errors import CheckpointError, ConfigError
from moejax.memory import compile_phases
from moejax.metrics import METRICS, last_step
from moejax.models import Rows, Transformer, build, unstack_repeats
from moejax.optimizer import param_paths
from moejax.parallel import make_mesh
from moejax.phases import at_step, shaped_like
from moejax.progress import progress_bar
from moejax.run_files import fetched
from moejax.stability import REASONS
from moejax.step import (
  TrainState,
  abstract_state,
  batch_sums,
  device_batch,
  make_train_step,
  state_shardings,
  step_rng,
)
from moejax.train import fresh_state

Array = jax.Array
_SHOWN = 48  # characters of a row's text


def main(argv: list[str]) -> int:
  """`moejax replay RUN --step=N`."""
  parser = argparse.ArgumentParser(
    "moejax replay",
    description="Do one step of a run again from the checkpoint before it, on "
    "one device, and print the loss of each row, the size of each layer's "
    "output, and the norms of its parameters and gradients. Writes nothing.",
  )
  parser.add_argument("workdir", help="folder of a run")
  parser.add_argument("--step", type=int, required=True, help="from 1")
  args = parser.parse_args(argv)
  replay(args.workdir, args.step)
  return 0


def replay(workdir: str | os.PathLike, step: int) -> None:
  """Prints what happened in a step, counted from 1.

  Raises:
    ConfigError: the run has no such step, or has not come to it.
    CheckpointError: no intact checkpoint of an earlier step.
  """
  config = runs.read_config(workdir)
  if not 1 <= step <= config.train.num_steps:
    raise ConfigError(
      f"--step={step} is not in [1, {config.train.num_steps}], the run's steps"
    )
  done = _require_reached(workdir, step)
  config = dataclasses.replace(config, parallel=ParallelConfig())
  tokenizer = runs.read_tokenizer(workdir)
  stores = data_lib.PhasedStores.open(config, tokenizer)
  state = _state_before(config, Path(workdir), step - 1)
  state = _catch_up(config, stores, state, step - 1)
  phase = phase_at(config, step - 1)
  with stores.batches(phase, step - 1) as batches:
    batch = next(batches)
  print(f"step {step}" + (f", phase {phase.name}" if phase.name else ""))
  if step > done:
    print(f"not in the run's log: it has done {done} steps")
  _print_step(shaped_like(config, phase), state, batch)
  _print_rows(phase, state, batch, stores.of(phase), tokenizer)
  _print_layers(shaped_like(config, phase), state, batch)


def _require_reached(workdir: str | os.PathLike, step: int) -> int:
  """The steps that the run has done; not those that it never came to.

  The one after them may be the one in which it died, and can be looked at.

  Raises:
    ConfigError: a later step.
  """
  logged = last_step(fetched(workdir) / METRICS)
  # Checkpoints tell it of a run whose log is lost.
  saved = CheckpointReader(runs.checkpoint_folder(workdir)).steps()
  done = max([logged, *saved])
  if step > done + 1:
    raise ConfigError(
      f"--step={step}: the run has done {done} steps; use one of at most "
      f"{done + 1}"
    )
  return done


def _state_before(config: Config, workdir: Path, step: int) -> TrainState:
  """The newest state of at most `step` steps; a fresh one at 0."""
  mesh = make_mesh(config.parallel)
  model = build(config.model)
  shardings = state_shardings(config, model, mesh)
  checkpoints = CheckpointReader(runs.checkpoint_folder(workdir))
  before = [number for number in checkpoints.steps() if number <= step]
  if before:
    abstract = abstract_state(config, model, shardings)
    print(f"from the checkpoint of step {before[-1]}")
    return checkpoints.restore(abstract, before[-1]).state
  if config.train.init_from or config.train.branch_from:
    raise CheckpointError(
      f"{workdir} has no checkpoint of step {step} or before"
    )
  print("from the run's beginning")
  return fresh_state(config, model, runs.read_tokenizer(workdir), shardings)


def _catch_up(
  config: Config, stores: data_lib.PhasedStores, state: TrainState, step: int
) -> TrainState:
  """The state after `step` steps."""
  model = build(config.model)
  done = int(state.step)
  if done == step:
    return state
  with progress_bar("steps until then", step - done) as bar:
    while done < step:
      phase = phase_at(config, done)
      programs = compile_phases(
        config, model, make_mesh(config.parallel), [phase]
      )
      with stores.batches(phase, done) as batches:
        while done < min(step, phase.end):
          batch = device_batch(next(batches), model.placement)
          state, _ = programs[phase](state, batch)
          done += 1
          bar.advance()
  return state


def _print_step(config: Config, state: TrainState, batch: Any) -> None:
  model = build(config.model)
  step = jax.jit(make_train_step(config, model))
  _, metrics = jax.device_get(step(state, device_batch(batch, model.placement)))
  metrics = {name: x for name, x in metrics.items() if np.ndim(x) == 0}
  verdict = int(metrics.pop("skipped"))
  print("taken" if not verdict else f"skipped: {REASONS[verdict]}")
  for name in sorted(metrics):
    print(f"  {name:<26} {metrics[name]:.6g}")


def _print_rows(
  phase: Phase, state: TrainState, batch: Any, stores: Any, tokenizer: Any
) -> None:
  """The loss of each row by itself, and how its text begins."""
  model = build(phase.config.model)
  # One row is one microbatch.
  train = dataclasses.replace(phase.config.train, accumulation_steps=1)
  config = dataclasses.replace(phase.config, train=train)

  @jax.jit
  def loss_of(row):
    sums, _ = batch_sums(config, model, state.variables, row, None)
    return sums.xent / jnp.maximum(sums.tokens, 1)

  placed = device_batch(batch, model.placement)
  single = lambda b: jax.tree.map(lambda x: x[b : b + 1], placed)
  print("\nrows (loss without routing noise)")
  for b in range(len(batch["tokens"])):
    loss = float(loss_of(single(b)))
    ids = batch["tokens"][b][batch["segment_ids"][b] > 0]
    text = repr(tokenizer.decode(ids[: 2 * _SHOWN].tolist()))[:_SHOWN]
    source = stores.stores[batch["source"][b]].source
    print(f"  {loss:>9.4f}  {source} row {batch['row'][b]}  {text}")


def _print_layers(config: Config, state: TrainState, batch: Any) -> None:
  """Outputs in forward order, then parameters and gradients, by layer."""
  apart = dataclasses.replace(config.model, scan_layers=False, remat="none")
  variables = state.variables
  if config.model.scan_layers:
    variables = unstack_repeats(config.model, variables)
  model = build(apart)
  placed = device_batch(batch, model.placement)
  at = at_step(config, state.step)
  sizes = _output_sizes(model, variables, placed, at.rope_H)
  print("\noutputs, in forward order: root mean square, what is not finite")
  for name, (size, bad) in sizes.items():
    print(f"  {name:<36} {size:>11.4g}{f'  {bad} NOT FINITE' if bad else ''}")
  first = next((name for name, (_, bad) in sizes.items() if bad), None)
  if first is not None:
    print(f"first output that is not finite: {first}")

  @jax.jit
  def gradient(params):
    def loss_fn(params):
      sums, stats = batch_sums(
        dataclasses.replace(config, model=apart), model,
        variables | {"params": params}, placed, step_rng(state), at,
      )  # fmt: skip
      return losses.total_loss(config.loss, sums, stats, at.loss)[0]

    return jax.grad(loss_fn)(params)

  params = variables["params"]
  grads = gradient(params)
  print("\nparameters: norm, gradient norm, gradients that are not finite")
  for path, p, g in zip(
    *map(jax.tree.leaves, (param_paths(params), params, grads))
  ):
    bad = int((~jnp.isfinite(g)).sum())
    norms = (float(jnp.linalg.norm(x)) for x in (p, g))
    said = " ".join(f"{norm:>11.4g}" for norm in norms)
    print(f"  {path:<44} {said}{f'  {bad}' if bad else ''}")


def _output_sizes(
  model: Transformer, variables: Any, batch: Any, rope_H: Array | None
) -> dict[str, tuple[float, int]]:
  """(root mean square, entries not finite) of what each module gives out."""
  rows = Rows(batch["segment_ids"], batch["positions"], rope_H=rope_H)

  @jax.jit
  def run(variables):
    _, found = model.apply(
      variables, batch["tokens"], rows, capture_intermediates=True,
      mutable=["intermediates"],
    )  # fmt: skip
    outputs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      found["intermediates"]
    ):
      keys = [str(k.key) for k in path if hasattr(k, "key")]
      name = "/".join(k for k in keys if k != "__call__")
      is_stream = leaf.ndim == 3 and leaf.shape[:2] == batch["tokens"].shape
      whole = not name or re.fullmatch(r"repeats_\d+", name)  # of blocks
      if name not in outputs and is_stream and not whole:
        x = leaf.astype(jnp.float32)
        outputs[name] = jnp.sqrt((x**2).mean()), (~jnp.isfinite(x)).sum()
    return outputs

  found = jax.device_get(run(variables))
  ordered = sorted(found, key=_forward_order)
  return {n: (float(found[n][0]), int(found[n][1])) for n in ordered}


def _forward_order(name: str) -> tuple:
  """Prefix, repeats by number, the end; parts of a layer in their order."""
  parts = name.split("/")
  first = {"prefix": 0, "repeats": 1}
  head, _, number = parts[0].rpartition("_")
  stage = first[head] if head in first else 2
  inside = "attention_norm attention ffn_norm mlp moe".split()
  places = [inside.index(p) if p in inside else 99 for p in parts[1:]]
  block = [int(p.rpartition("_")[2]) for p in parts if p.startswith("block_")]
  where = [p for p in places if p != 99] or [98]
  return stage, int(number) if number.isdigit() else 0, block, where, name
