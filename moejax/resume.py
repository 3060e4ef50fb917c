# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: what may have changed since, and what may not."""

import os
from typing import Any

import numpy as np

from moejax import runs
from moejax.checkpoint import Checkpointer, CheckpointReader, Restored
from moejax.config import Config, differences
from moejax.data import StoreSet, Tokenizer
from moejax.errors import CheckpointError
from moejax.optimizer import schedule_values
from moejax.step import TrainState

# A changed value of these changes nothing that was or will be computed.
FREE_OPTIONS = (
  "checkpoint.", "eval.", "data.num_workers", "data.prefetch_rows",
  "data.store", "train.accumulation_steps", "model.remat",
  "model.attention", "model.moe.matmul", "model.moe.dispatch",
  "loss.chunk_size", "parallel.",
)  # fmt: skip


def refuse_converted(workdir: str | os.PathLike) -> None:
  """Converted weights have no optimizer state and no place in the data.

  Raises:
    CheckpointError: the folder holds some.
  """
  checkpoints = CheckpointReader(runs.checkpoint_folder(workdir))
  if checkpoints.latest() is None:
    return
  if "converted_from" in checkpoints.read_meta():
    raise CheckpointError(
      f"{workdir} holds converted weights, not a run; train from them in a "
      f"--workdir of its own, with --config.train.init_from={workdir}"
    )


def restore_or_none(
  config: Config,
  abstract: TrainState,
  checkpoints: Checkpointer,
  tokenizer: Tokenizer,
  stores: StoreSet,
) -> Restored | None:
  """The newest valid checkpoint, if it is of this very run.

  Args:
    abstract: the state to return, with a sharding for each leaf.
    config, checkpoints, tokenizer, stores: of the run.

  Raises:
    CheckpointError: it is of another run, or none is intact.
  """
  if checkpoints.is_empty():
    return None
  meta = checkpoints.read_meta()
  check_same_run(config, meta)
  for name, mine in (
    ("tokenizer", tokenizer.digest), ("data", stores.fingerprint)
  ):  # fmt: skip
    if meta[name] != mine:
      raise CheckpointError(
        f"the {name} changed since step {meta['step']} (sha256 "
        f"{meta[name][:12]} -> {mine[:12]}); put it back or use a new --workdir"
      )
  return checkpoints.restore(abstract)


def check_same_run(config: Config, meta: dict[str, Any]) -> None:
  """Refuses to go on with a config that would change what was trained.

  `train.num_steps` may grow as long as the learning rates of the steps already
  done stay what they were.

  Raises:
    CheckpointError: naming each key that differs.
  """
  # Options that came to be since the run began have their defaults, which are
  # what it did without them.
  stored = Config.from_dict(meta["config"])
  changed = [
    line
    for line in differences(stored.to_dict(), config.to_dict())
    if not line.startswith(FREE_OPTIONS)
  ]
  schedule_only = [
    line for line in changed
    if not line.startswith(("train.num_steps", "optimizer.schedule."))
  ]  # fmt: skip
  if schedule_only:
    raise CheckpointError(
      "the config differs from the run's in " + "; ".join(schedule_only)
      + "; put it back, or use a new --workdir"
    )  # fmt: skip
  if changed:
    done = meta["step"]
    before = schedule_values(stored)[:done]
    after = schedule_values(config)[:done]
    if len(after) < done or not np.array_equal(before, after):
      raise CheckpointError(
        f"{'; '.join(changed)} would change the learning rate of steps already "
        f"done (the run is at step {done}); give warm-up in steps, and extend "
        "before the decay begins, or use a new --workdir"
      )


def how_to_go_on(config: Config) -> str:
  """What a person may do with a run that reached its last step."""
  decay = config.optimizer.schedule.lengths(config.train.num_steps)[1]
  if config.optimizer.schedule.name == "wsd" and not decay:
    return "raise train.num_steps to go on"
  return (
    "its learning rate has decayed, so a longer run needs a new --workdir (or "
    "optimizer.schedule.decay=0 from the start)"
  )
