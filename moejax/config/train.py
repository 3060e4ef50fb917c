# SPDX-License-Identifier: Apache-2.0
"""Options of a run: its length and phases."""

import dataclasses
import difflib
import typing
from typing import Any, Self

import ml_collections

from moejax.config.fields import (
  nearest_divisor,
  option,
  require,
  require_positive,
)
from moejax.errors import ConfigError

# What a phase may set: nothing of the state's shape.
PHASE_OPTIONS = (
  "optimizer.learning_rate", "optimizer.schedule.name",
  "optimizer.schedule.warmup", "optimizer.schedule.decay",
  "optimizer.schedule.decay_shape", "optimizer.schedule.final",
  "loss.z_loss", "loss.load_balance", "loss.sequence_balance",
  "loss.mutual_information", "loss.router_entropy", "loss.router_z",
  "model.rope_theta", "model.rope_scaling", "data.weights", "data.seq_len",
  "data.order", "train.batch_size", "train.accumulation_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
  """A stretch of the run in which some options are others.

  In a config file a dictionary: `{"name": "anneal", "tokens": 100e9, "options":
  {"optimizer.learning_rate": 4e-5}}`.

  Attributes:
    name: unique.
    steps, tokens: its length, one of them; of the last phase neither: it ends
      with the run.
    options: (dotted option, value); all others are the config's.
  """

  name: str
  steps: int = 0
  tokens: float = 0.0
  options: tuple[tuple[str, Any], ...] = ()

  @classmethod
  def from_value(cls, value: Any, path: str) -> Self:
    """Builds and checks one from the mapping that a config file writes."""
    if isinstance(value, cls):
      return value
    if not isinstance(value, (typing.Mapping, ml_collections.ConfigDict)):
      raise ConfigError(f"{path}={value!r} must be a dictionary with a name")
    # They need the whole config, of which this is a part.
    from moejax.config.options import check_type, option_at

    fields = {"name": str, "steps": int, "tokens": float}
    kwargs: dict[str, Any] = {}
    for key in value:
      if key == "options":
        continue
      if key not in fields:
        raise ConfigError(
          f"{path}: no key {key!r}; a phase has name, steps or tokens, options"
        )
      kwargs[key] = check_type(fields[key], value[key], f"{path}.{key}")
    if "name" not in kwargs or not kwargs["name"]:
      raise ConfigError(f"{path} has no name")
    options = dict(value["options"]) if "options" in value else {}
    where = f"phase {kwargs['name']}"
    for key in options:
      if key not in PHASE_OPTIONS:
        near = difflib.get_close_matches(key, PHASE_OPTIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
          f"{where} cannot set {key}{hint}. Phases set "
          f"{', '.join(PHASE_OPTIONS)}"
        )
      kind = option_at(key).type
      options[key] = check_type(kind, options[key], f"{where}: {key}")
    return cls(**kwargs, options=tuple(options.items()))

  def __post_init__(self):
    for name in ("steps", "tokens"):
      value = getattr(self, name)
      require(value >= 0, f"phase {self.name}: {name}={value} is negative")
    require(
      not (self.steps and self.tokens),
      f"phase {self.name} has steps and tokens; give one of them",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The length and size of the run."""

  num_steps: int = option(10_000, "optimizer steps")
  init_from: str = option(
    "", "folder of a run, trained or converted, whose weights this one takes"
  )
  branch_from: str = option(
    "",
    "RUN or RUN:step whose whole state this run begins with, steps and "
    "data included",
  )
  phases: tuple[PhaseConfig, ...] = option(
    (), "stretches of the run that set some options anew; see docs/phases.md"
  )
  batch_size: int = option(32, "rows of a global batch B")
  accumulation_steps: int = option(
    1, "microbatches a batch is computed in; changes memory, not the result"
  )

  def __post_init__(self):
    require_positive(
      "train", self, "num_steps", "batch_size", "accumulation_steps"
    )
    require(
      not (self.init_from and self.branch_from),
      "train.init_from takes weights, train.branch_from the whole state; give "
      "one of them",
    )
    require(
      self.batch_size % self.accumulation_steps == 0,
      f"train.batch_size={self.batch_size} is not divisible by "
      f"train.accumulation_steps={self.accumulation_steps}; use "
      f"{nearest_divisor(self.batch_size, self.accumulation_steps)}",
    )
