# SPDX-License-Identifier: Apache-2.0
"""How a run is split, saved and evaluated: no weight depends on it."""

import dataclasses
import math
import re

from moejax.config.fields import (
  option,
  require,
  require_choice,
  require_positive,
)
from moejax.errors import ConfigError
from moejax.spec import Spec


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """The mesh: how a run is split over devices, which changes no result.

  Their product is the number of devices.
  """

  data: int = option(1, "copies of the weights; each takes part of a batch")
  fsdp: int = option(
    1,
    "as `data`, but each keeps a part of weights and optimizer state and "
    "gathers the rest when it is used (ZeRO-3)",
  )
  expert: int = option(
    1, "as `fsdp`, but experts stay where they are and tokens go to them"
  )
  tensor: int = option(1, "parts of each head group, expert and dense layer")
  sequence: int = option(
    1, "parts of each row; attention sees whole rows of some heads"
  )
  exchange: str = option(
    "auto",
    "how tokens reach experts: all_to_all (rows go to where they are wanted), "
    "all_gather (all rows go everywhere; for small expert groups)",
  )
  receive_factor: float = option(
    0.0,
    "room for rows that a device's experts get, over the rows that it sends; "
    "0: for all that could come. Rows beyond it are dropped and counted in "
    "router/dropped",
  )
  overlap: str = option(
    "kernels",
    "what collectives run beside, as asked of a TPU's or GPU's compiler: "
    "kernels and all else; other (not kernels, with which libtpu 0.0.42 aborts "
    "on some steps); none (the compiler's defaults)",
  )

  AXES = ("data", "fsdp", "expert", "tensor", "sequence")
  EXCHANGES = ("auto", "all_to_all", "all_gather")
  OVERLAPS = ("kernels", "other", "none")

  def __post_init__(self):
    require_positive("parallel", self, *self.AXES)
    require_choice("parallel.exchange", self.exchange, self.EXCHANGES)
    require_choice("parallel.overlap", self.overlap, self.OVERLAPS)
    require(
      self.receive_factor == 0 or self.receive_factor >= 1,
      f"parallel.receive_factor={self.receive_factor} must be 0 or at least 1",
    )

  @property
  def num_devices(self) -> int:
    return math.prod(getattr(self, axis) for axis in self.AXES)

  @property
  def batch_parts(self) -> int:
    """Into how many parts the rows of a batch go."""
    return self.data * self.fsdp * self.expert


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep."""

  every: int = option(1000, "steps between checkpoints")
  keep_last: int = option(2, "newest checkpoints to keep")
  keep_every: int = option(0, "keep each multiple of this for good; 0 is none")
  compare_copies: bool = option(
    True,
    "before each save, compare what devices hold copies of: a faulty device "
    "ends the run with the name of the array, and nothing wrong is saved",
  )
  timeout: int = option(
    1200,
    "seconds that a save may take; then the run ends with "
    "one line, and goes on from the checkpoint before",
  )

  def __post_init__(self):
    require_positive("checkpoint", self, "every", "keep_last", "timeout")
    require(self.keep_every >= 0, "checkpoint.keep_every is negative")
    require(
      self.keep_every % self.every == 0,
      f"checkpoint.keep_every={self.keep_every} is not a multiple of "
      f"checkpoint.every={self.every}",
    )


@dataclasses.dataclass(frozen=True)
class EvalSetConfig:
  """Something more to evaluate in training: text of its own, or a task.

  In a config file a dictionary: `{"name": "books", "data": ("books/*.txt",)}`,
  or `{"name": "copying", "task": "my_tasks.copying(length=20)", "every": 200}`.

  Attributes:
    name: unique; its metrics are `validation/NAME/...`.
    data: sources, as in `data.sources`, of which nothing is trained on here;
      `moejax data prepare` makes their stores too.
    task: module and function of one's own, and its arguments. It is called as
      `(run, **arguments)` with a `moejax.runs.Run` and returns numbers by name.
    every: steps between evaluations; 0 takes eval.every.
    num_batches: of `data`; 0 takes eval.num_batches.
  """

  name: str = ""
  data: tuple[str, ...] = ()
  task: str = ""
  every: int = 0
  num_batches: int = 0

  def __post_init__(self):
    require(
      re.fullmatch(r"[\w.-]+", self.name) is not None
      and self.name not in ("router", "sources"),
      f"eval.sets: the name {self.name!r} is none of letters, digits, _ . - "
      "(nor router or sources, which metrics are called)",
    )
    require(
      bool(self.data) != bool(self.task),
      f"eval.sets: {self.name} needs data or a task, one of them",
    )
    for name in ("every", "num_batches"):
      value = getattr(self, name)
      require(value >= 0, f"eval.sets: {self.name}: {name}={value} is negative")
    assert not self.task or self.task_spec  # parses, and so checks it

  @property
  def task_spec(self) -> Spec:
    try:
      spec = Spec.parse(self.task)
    except ValueError as e:
      raise ConfigError(f"eval.sets: {self.name}: {e}") from None
    require(
      "." in spec.name,
      f"eval.sets: {self.name}: task={self.task!r} is not MODULE.FUNCTION",
    )
    return spec


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Validation during training."""

  every: int = option(500, "steps between evaluations; 0 is never")
  num_batches: int = option(16, "validation batches; fewer if they run out")
  batch_size: int = option(0, "rows per batch; 0 takes train.batch_size")
  ema: bool = option(
    False, "evaluate the averaged weights on the validation rows too"
  )
  sets: tuple[EvalSetConfig, ...] = option(
    (), "more to evaluate on, each a dictionary; see docs/recipe.md"
  )
  task_errors: str = option(
    "note", "a task that raises: note (and train on) or stop (after saving)"
  )
  sample_prompt: str = option("", "text continued at each evaluation")
  sample_tokens: int = option(0, "tokens of that sample; 0 writes none")

  def __post_init__(self):
    for name in ("every", "batch_size", "sample_tokens"):
      require(getattr(self, name) >= 0, f"eval.{name} is negative")
    require_positive("eval", self, "num_batches")
    require_choice("eval.task_errors", self.task_errors, ("note", "stop"))
    names = [entry.name for entry in self.sets]
    require(len(set(names)) == len(names), f"eval.sets: {names} repeats one")
    for entry in self.sets:
      require(
        entry.every + self.every > 0,
        f"eval.sets: {entry.name} has no interval; give every, or eval.every",
      )
