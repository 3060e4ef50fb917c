# SPDX-License-Identifier: Apache-2.0
"""Whether the points of a sweep can be built, before the first one runs."""

import dataclasses
from typing import TextIO

import jax

from moejax import data as data_lib
from moejax import runs
from moejax.config import Config, ParallelConfig
from moejax.errors import DataError, UserError
from moejax.models import build
from moejax.progress import progress_bar
from moejax.step import BATCH_KEYS, batch_sums, init_state
from moejax.sweep.spec import PlannedRun, raise_wrong_points
from moejax.train import load_tokenizer_of


def check_points(
  planned: list[PlannedRun],
  data_may_lack: bool = False,
  stream: TextIO | None = None,
) -> list[str]:
  """Traces each point's model on a batch, and opens its data.

  On a CPU, whatever the runs are for: kernels of their platform are not asked
  for, and its devices are left to them.

  Args:
    planned: runs.
    data_may_lack: whether data that is not prepared is but a line to print.
    stream: where progress goes; None is stdout.

  Returns:
    Such lines.

  Raises:
    ConfigError: naming every point that cannot be built.
  """
  by_point = {run.point: run.config for run in planned}
  wrong: dict[str, str] = {}
  notes: dict[str, None] = {}
  cause: BaseException | None = None  # for --debug
  opened: set[str] = set()
  with progress_bar("checking points", len(by_point), stream) as bar:
    for point, config in by_point.items():
      try:
        _trace(config)
        if repr(config.data) not in opened:
          try:
            _open_data(config)
            opened.add(repr(config.data))
          except DataError as e:
            if not data_may_lack:
              raise
            notes[f"note: {e}"] = None
        if config.train.init_from:
          runs.read_config(config.train.init_from)
      except UserError as e:
        wrong[point], cause = str(e), cause or e.__cause__
      bar.advance()
  raise_wrong_points(wrong, cause)
  return list(notes)


def _trace(config: Config) -> None:
  """The forward pass of training on one row of the config's length."""
  anywhere = dataclasses.replace(
    config.model,
    attention="auto",
    moe=dataclasses.replace(config.model.moe, matmul="auto"),
  )
  config = dataclasses.replace(
    config,
    model=anywhere,
    parallel=ParallelConfig(),
    train=dataclasses.replace(config.train, batch_size=1, accumulation_steps=1),
    eval=dataclasses.replace(config.eval, batch_size=0),
  )
  model = build(config.model)
  row = lambda kind: jax.ShapeDtypeStruct((1, config.data.seq_len), kind)
  batch = dict.fromkeys(BATCH_KEYS, row("int32")) | {"loss_mask": row("bool")}

  def forward(batch):
    key = jax.random.key(0)
    variables = init_state(config, model).variables
    return batch_sums(config, model, variables, batch, key)

  jax.eval_shape(forward, batch)


def _open_data(config: Config) -> None:
  data_lib.open_stores(config.data, load_tokenizer_of(config))
