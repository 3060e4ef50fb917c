# SPDX-License-Identifier: Apache-2.0
"""Loss on text that was not trained on."""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moejax import data as data_lib
from moejax.config import Config
from moejax.data.tokenizer import Tokenizer
from moejax.errors import ConfigError, DataError
from moejax.losses import router_metrics
from moejax.models import Transformer, Variables
from moejax.models.placement import Axes
from moejax.progress import progress_bar
from moejax.runs import load_run
from moejax.step import device_batch, make_eval_step, shards_of


def evaluate(
  config: Config,
  model: Transformer,
  variables: Variables,
  stores: Any,
  tokenizer: Tokenizer,
) -> dict[str, float]:
  """Means over the first `eval.num_batches` validation batches.

  Returns:
    `validation/xent` (nats per token), `validation/perplexity`,
    `validation/bits_per_byte`, `validation/tokens`, the routers' metrics and,
    of several sources, `validation/sources/NAME/xent` and `.../bits_per_byte`.
  """
  names, count = source_names(config), config.eval.num_batches
  with validation_batches(config, model, stores, count) as batches:
    values = evaluate_batches(
      config, model, variables, batches, tokenizer, names
    )
  return {f"validation/{key}": value for key, value in values.items()}


def source_names(config: Config) -> tuple[str, ...]:
  """Of the sources, where they are more than one."""
  specs = config.data.sources
  return data_lib.metric_names(specs) if len(specs) > 1 else ()


def validation_batches(
  config: Config,
  model: Transformer,
  stores: Any,
  num_batches: int,
  split: str = "validation",
) -> data_lib.BatchIterator:
  """The first `num_batches` validation batches, in microbatches of own rows.

  Which rows these are does not depend on `train.accumulation_steps`.
  """
  size = config.eval.batch_size or config.train.batch_size
  micro = micro_rows(config)
  return data_lib.validation_batches(
    stores, micro, num_batches * size // micro, split=split,
    shards=shards_of(model, micro), timeout=config.data.timeout,
  )  # fmt: skip


def micro_rows(config: Config) -> int:
  """Rows that are evaluated at a time: as many as are trained on at a time."""
  if config.eval.batch_size:
    return config.eval.batch_size
  return config.train.batch_size // config.train.accumulation_steps


def evaluate_batches(
  config: Config,
  model: Transformer,
  variables: Variables,
  batches,
  tokenizer: Tokenizer,
  names: Sequence[str] = (),
) -> dict[str, float]:
  """Means over all targets of `batches`; see `evaluate`.

  Args:
    config, model, variables: what is evaluated.
    batches: of this process's rows.
    tokenizer: of their ids.
    names: of the sources of the rows, which are then told apart.
  """
  eval_step = jitted_eval_step(config, model)
  xent = tokens = num_bytes = 0.0
  by_source = np.zeros((3, len(names)))  # xent, tokens, bytes
  stats = None
  for batch in batches:
    sums, batch_stats = jax.device_get(
      eval_step(variables, device_batch(batch, model.placement))
    )
    xent += float(sums.xent)
    tokens += float(sums.tokens)
    num_bytes += count_bytes(batch, batch["loss_mask"], tokenizer)
    if names:
      bytes_U = _bytes_by_source(batch, tokenizer, len(names))
      by_source += np.stack([sums.xent_U, sums.tokens_U, bytes_U])
    if batch_stats is not None:
      if stats is not None:
        batch_stats = jax.tree.map(np.add, stats, batch_stats)
      stats = batch_stats
  if not tokens:
    raise DataError("there is nothing to evaluate on: no target token")
  num_bytes = model.placement.sum_over_readers(num_bytes)
  mean = xent / tokens
  values = {
    "xent": mean,
    "perplexity": math.exp(min(mean, 700.0)),
    "bits_per_byte": xent / math.log(2) / max(num_bytes, 1.0),
    "tokens": tokens,
  }
  for name, (xent, tokens, num_bytes) in zip(names, by_source.T):
    num_bytes = model.placement.sum_over_readers(num_bytes)
    if tokens:
      bits = xent / math.log(2) / max(num_bytes, 1.0)
      values[f"sources/{name}/xent"] = xent / tokens
      values[f"sources/{name}/bits_per_byte"] = bits
  if stats is not None:
    values |= {k: float(v) for k, v in router_metrics(stats).items()}
  return values


def count_bytes(
  batch: dict[str, np.ndarray], mask_BT: np.ndarray, tokenizer: Tokenizer
) -> int:
  """UTF-8 bytes of the targets under a mask, as their text has them.

  Without what the tokenizer puts before a text, after the token that begins it.
  """
  targets_BT, tokens_BT = batch["targets"], batch["tokens"]
  found = tokenizer.count_bytes(targets_BT[mask_BT])
  if tokenizer.bos_id is None or not tokenizer.invented_bytes:
    return found
  begun_BT = mask_BT & (tokens_BT == tokenizer.bos_id)
  begun_BT &= targets_BT != tokenizer.eos_id  # an empty one
  return found - tokenizer.invented_bytes * int(begun_BT.sum())


def _bytes_by_source(
  batch: dict[str, np.ndarray], tokenizer: Tokenizer, count: int
) -> list[int]:
  """Bytes of the targets of each source's rows."""
  of_source = lambda s: batch["loss_mask"] & (batch["source_ids"] == s)
  return [count_bytes(batch, of_source(s), tokenizer) for s in range(count)]


def _shown(batches: Iterable[Any]) -> Iterator[Any]:
  """The batches, with progress on stderr: stdout holds the result alone."""
  with progress_bar("evaluating, batches", None, sys.stderr) as bar:
    for batch in batches:
      yield batch
      bar.advance()


def jitted_eval_step(config: Config, model: Transformer):
  """`make_eval_step`; runs that differ in their seed alone share it."""
  return _eval_step_of_any_seed(dataclasses.replace(config, seed=0), model)


@functools.lru_cache(maxsize=32)
def _eval_step_of_any_seed(config: Config, model: Transformer):
  # Whole on each device, so that each process can read them.
  everywhere = model.placement.sharding(Axes())
  return jax.jit(make_eval_step(config, model), out_shardings=everywhere)


def main(argv: list[str]) -> int:
  """`moejax eval RUN [--data FILES]`."""
  parser = argparse.ArgumentParser(
    "moejax eval",
    description="Loss of a run's checkpoint: on its validation rows, or on "
    "any text files with --data.",
  )
  add = parser.add_argument
  add("workdir", help="folder of a run")
  add("--data", action="append", help="file, folder or glob of text")
  add("--step", type=int, help="checkpoint step (default: the newest)")
  add("--num-batches", type=int, help="most batches (default: the config's; "
      "of --data all)")  # fmt: skip
  add("--json", action="store_true", help="print one JSON object")
  add("--ema", action="store_true", help="the moving average of the weights")
  args = parser.parse_args(argv)
  run = load_run(args.workdir, args.step, ema=args.ema)
  config = run.config
  if args.num_batches is not None and args.num_batches < 1:
    raise ConfigError(f"--num-batches={args.num_batches} must be positive")
  names: tuple[str, ...] = ()
  if args.data:
    micro, most = micro_rows(config), args.num_batches
    if most is not None:
      most *= (config.eval.batch_size or config.train.batch_size) // micro
    batches = data_lib.file_batches(
      args.data, run.tokenizer, config.data, micro, most
    )
  else:
    stores = data_lib.open_stores(config.data, run.tokenizer)
    batches = validation_batches(
      config, run.model, stores, args.num_batches or config.eval.num_batches
    )
    names = source_names(config)
  with contextlib.closing(batches):
    values = evaluate_batches(
      config, run.model, run.variables, _shown(batches), run.tokenizer, names
    )
  name = ", ".join(args.data) if args.data else "validation"
  if args.json:
    print(json.dumps({"step": run.step, "data": name, **values}))
    return 0
  print(f"{os.fspath(args.workdir)}, step {run.step}, on {name}:")
  for key, value in values.items():
    print(f"  {key:<22} {value:.5g}")
  return 0
