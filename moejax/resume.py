# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: what may have changed since, and what may not."""

import dataclasses
import itertools
import os
from typing import Any

import numpy as np

from moejax import runs
from moejax.checkpoint import Checkpointer, CheckpointReader, Restored
from moejax.config import Config, differences, phases_of, schedule_stretches
from moejax.data import PhasedStores, Tokenizer
from moejax.errors import CheckpointError
from moejax.optimizer import schedule_values
from moejax.step import TrainState

# A changed value of these changes nothing that was or will be computed.
FREE_OPTIONS = (
  "checkpoint.", "eval.", "data.num_workers", "data.prefetch_rows",
  "data.store", "data.timeout", "train.accumulation_steps", "model.remat",
  "model.attention", "model.moe.matmul", "model.moe.dispatch",
  "loss.chunk_size", "parallel.", "train.branch_from", "stability.max_skipped",
)  # fmt: skip
# But this drops rows.
NOT_FREE = "parallel.receive_factor"


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
  stores: PhasedStores,
) -> Restored | None:
  """The newest valid checkpoint, if it is of this very run.

  In a folder without one: that of `train.branch_from`, whose rules are the
  same; None if there is none either.

  Args:
    abstract: the state to return, with a sharding for each leaf.
    config, checkpoints, tokenizer, stores: of the run.

  Raises:
    CheckpointError: it is of another run, or none is intact.
  """
  step = None
  if checkpoints.is_empty():
    if not config.train.branch_from:
      return None
    source, step = branch_point(config.train.branch_from)
    checkpoints = CheckpointReader(runs.checkpoint_folder(source))
  meta = checkpoints.read_meta(step)
  check_same_run(config, meta, branches=step is not None)
  theirs = meta["data"]
  # Of phases that had begun; one string where there were none yet.
  theirs = [theirs] if isinstance(theirs, str) else theirs
  digests = [("tokenizer", meta["tokenizer"], tokenizer.digest)]
  for phase, before, now in zip(phases_of(config), theirs, stores.fingerprints):
    if phase.start < meta["step"]:
      where = f"data of phase {phase.name}" if phase.name else "data"
      digests.append((where, before, now))
  for name, before, now in digests:
    if before != now:
      raise CheckpointError(
        f"the {name} changed since step {meta['step']} (sha256 "
        f"{before[:12]} -> {now[:12]}); put it back or use a new --workdir"
      )
  return checkpoints.restore(abstract, step)


def branch_point(name: str) -> tuple[str, int]:
  """Folder or address, and step of `RUN` (its newest) or `RUN:step`.

  Raises:
    DataError: no run there.
    CheckpointError: no such step, or weights that were converted.
  """
  path, colon, number = name.rpartition(":")
  if not (colon and number.isascii() and number.isdecimal()):
    path, number = name, ""
  runs.read_config(path)
  checkpoints = CheckpointReader(runs.checkpoint_folder(path))
  steps = checkpoints.steps()
  step = int(number) if number else checkpoints.latest()
  if step is None or step not in steps:
    listed = ", ".join(map(str, steps)) or "none"
    raise CheckpointError(
      f"train.branch_from={name}: no such checkpoint; there are {listed} "
      "(checkpoint.keep_every keeps more)"
    )
  if "converted_from" in checkpoints.read_meta(step):
    raise CheckpointError(
      f"train.branch_from={name} are converted weights without a state; use "
      "train.init_from"
    )
  return path, step


def check_same_run(
  config: Config, meta: dict[str, Any], branches: bool = False
) -> None:
  """Refuses to go on with a config that would change what was trained.

  `train.num_steps` may grow as long as the learning rates of the steps already
  done stay what they were, and phases may change that have not begun.

  Args:
    config: to go on with.
    meta: of the checkpoint.
    branches: whether it is another run's; what that one began with is in its
      state, and no part of the branch's config.

  Raises:
    CheckpointError: naming each key that differs.
  """
  # Options that came to be since the run began have their defaults, which are
  # what it did without them.
  stored = Config.from_dict(meta["config"])
  if branches:
    begun = dataclasses.replace(stored.train, init_from=config.train.init_from)
    stored = dataclasses.replace(stored, train=begun)
  changed = [
    line
    for line in differences(stored.to_dict(), config.to_dict())
    if not _is_free(line)
  ]
  later = ("train.num_steps", "train.phases", "optimizer.schedule.")
  for_good = [line for line in changed if not line.startswith(later)]
  if for_good:
    raise CheckpointError(
      "the config differs from the run's in " + "; ".join(for_good)
      + "; put it back, or use a new --workdir"
    )  # fmt: skip
  if changed:
    done = meta["step"]
    _check_phases_done(stored, config, done)
    if config.train.num_steps < done:
      raise CheckpointError(
        f"train.num_steps={config.train.num_steps}, and the run is at step "
        f"{done} already: use a higher one, or a new --workdir"
      )
    before = schedule_values(stored)[:done]
    after = schedule_values(config)[:done]
    if not np.array_equal(before, after):
      raise CheckpointError(
        f"{'; '.join(changed)} would change the learning rate of steps already "
        f"done (the run is at step {done}); give warm-up in steps, and extend "
        "before the decay begins, or use a new --workdir"
      )


def _is_free(line: str) -> bool:
  return line.startswith(FREE_OPTIONS) and not line.startswith(NOT_FREE)


def _check_phases_done(stored: Config, config: Config, done: int) -> None:
  """Refuses phases that change what was done in the first `done` steps."""
  begun = [
    [p for p in phases_of(c) if p.start < done] for c in (stored, config)
  ]
  for before, now in itertools.zip_longest(*begun):
    if before is None or now is None or before.start != now.start:
      raise CheckpointError(
        f"train.phases would begin other phases before step {done}, which the "
        "run has reached; put them back, or use a new --workdir"
      )
    changed = [
      line
      for line in differences(before.config.to_dict(), now.config.to_dict())
      if not _is_free(line)
      and not line.startswith(("train.num_steps", "optimizer."))
    ]
    if changed:
      raise CheckpointError(
        f"phase {before.name or now.name} has begun and would differ in "
        f"{'; '.join(changed)}; put it back, or use a new --workdir"
      )


def how_to_go_on(config: Config) -> str:
  """What a person may do with a run that reached its last step."""
  *_, (_, steps, optimizer) = schedule_stretches(config)
  decay = optimizer.schedule.lengths(steps)[1]
  if optimizer.schedule.name == "wsd" and not decay:
    return "raise train.num_steps to go on"
  return (
    "its learning rate has decayed, so a longer run needs a new --workdir (or "
    "optimizer.schedule.decay=0 from the start)"
  )
