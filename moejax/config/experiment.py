# SPDX-License-Identifier: Apache-2.0
"""A whole experiment: its sections, what must fit together, and its phases."""

import dataclasses
import functools
import math
import typing
from typing import Any, Self

from moejax.config.data import DataConfig
from moejax.config.fields import (
  LARGEST,
  multiples,
  nearest_divisor,
  option,
  require,
  section,
)
from moejax.config.model import ModelConfig
from moejax.config.optimizer import LossConfig, OptimizerConfig, StabilityConfig
from moejax.config.runtime import CheckpointConfig, EvalConfig, ParallelConfig
from moejax.config.train import PhaseConfig, TrainConfig
from moejax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment."""

  seed: int = option(0, "of parameters, data order and routing noise")
  model: ModelConfig = section(ModelConfig, "architecture")
  data: DataConfig = section(DataConfig, "data")
  optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer")
  loss: LossConfig = section(LossConfig, "loss")
  train: TrainConfig = section(TrainConfig, "training")
  parallel: ParallelConfig = section(ParallelConfig, "split over devices")
  checkpoint: CheckpointConfig = section(CheckpointConfig, "checkpoints")
  eval: EvalConfig = section(EvalConfig, "evaluation")
  stability: StabilityConfig = section(StabilityConfig, "steps not taken")

  def __post_init__(self):
    require(self.seed >= 0, f"seed={self.seed} is negative")
    require(
      not self.eval.ema or self.optimizer.ema > 0,
      "eval.ema=True needs an average: set optimizer.ema, such as 0.999",
    )
    tokens = self.train.batch_size * self.data.seq_len
    require(
      tokens <= LARGEST,
      f"train.batch_size * data.seq_len: {tokens} tokens are beyond {LARGEST}",
    )
    self._check_parallel()
    self._check_phases()
    self._check_schedules()

  def _check_schedules(self) -> None:
    for start, steps, optimizer in schedule_stretches(self):
      warmup, decay = optimizer.schedule.lengths(steps)
      where = f"train.num_steps={steps}"
      if self.train.phases:
        where = f"the {steps} steps from step {start} on"
      require(
        warmup + decay <= steps,
        f"optimizer.schedule.warmup and .decay, {warmup} and {decay} steps, do "
        f"not fit in {where}; shorten them or use shares such as 0.1",
      )

  def _check_phases(self) -> None:
    """Lengths, and whether the rest fits what each phase sets."""
    *earlier, last = self.train.phases or (None,)
    if last is None:
      return
    names = [phase.name for phase in self.train.phases]
    require(len(set(names)) == len(names), f"train.phases: {names} repeats one")
    require(
      not (last.steps or last.tokens),
      f"phase {last.name} is the last and ends at train.num_steps; give it no "
      "steps or tokens",
    )
    for phase in earlier:
      require(
        bool(phase.steps or phase.tokens),
        f"phase {phase.name} has no length; give it steps or tokens",
      )
    for phase in self.train.phases:
      try:
        other = with_phase(self, phase).model.rope_scaling_spec
      except ConfigError as e:
        raise ConfigError(f"phase {phase.name}: {e}") from None
      mine = self.model.rope_scaling_spec
      require(
        other == mine or "yarn" not in (other.name, mine.name),
        f"phase {phase.name}: model.rope_scaling {mine} -> {other}: yarn also "
        "scales attention's scores, which are the same in all phases",
      )

  def _check_parallel(self) -> None:
    """What is split must divide; each message names sizes that would."""
    split, model, train = self.parallel, self.model, self.train
    parts = split.batch_parts * train.accumulation_steps
    size = train.batch_size
    require(
      size % parts == 0,
      f"train.batch_size={size} does not divide into parallel.data * fsdp * "
      f"expert * train.accumulation_steps = {parts} parts; use "
      f"{multiples(size, parts)}",
    )
    size, parts = self.eval.batch_size, split.batch_parts
    require(
      size % parts == 0,
      f"eval.batch_size={size} does not divide into parallel.data * fsdp * "
      f"expert = {parts} parts; use {multiples(size, parts)}",
    )
    routed = any(layer.num_routers for layer in model.layers)
    attends = any(layer.mixer != "mla" for layer in model.layers)
    dense = any(layer.ffn == "mlp" for layer in model.layers)
    seq_len, moe = self.data.seq_len, model.moe
    for axis, key, number, there in (
      ("sequence", "data.seq_len", seq_len, True),
      ("tensor", "data.seq_len", seq_len // split.sequence, True),
      ("expert", "model.moe.num_experts", moe.num_experts, routed),
      ("tensor", "model.moe.d_expert", moe.d_expert, routed),
      ("tensor", "model.d_mlp", model.d_mlp, dense),
      ("tensor", "model.num_heads", model.num_heads, True),
      ("tensor", "model.num_kv_heads", model.num_kv_heads, attends),
    ):
      ways = getattr(split, axis)
      require(
        not there or number % ways == 0,
        f"{key}={number} does not divide by parallel.{axis}={ways}; use "
        f"parallel.{axis}={nearest_divisor(number, ways)} or {key}="
        f"{multiples(number, ways)}",
      )

  @classmethod
  def from_dict(cls, values: typing.Mapping[str, Any]) -> Self:
    """Builds and checks a config from a (possibly partial) nested mapping.

    Raises:
      ConfigError: an unknown key (naming the nearest), a wrong type, or values
        that do not fit together.
    """
    from moejax.config.options import build_section  # which needs this one

    return build_section(cls, values, "")

  def to_dict(self) -> dict[str, Any]:
    """Nested plain dictionary, the form stored as JSON with each run."""
    values = dataclasses.asdict(self)
    for phase in values["train"]["phases"]:
      phase["options"] = dict(phase["options"])
    return values


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of a run.

  Attributes:
    name: empty in a run without phases.
    start: steps before it.
    end: steps at its end.
    config: what holds in it; it has no phases.
    own_schedule: whether its learning rate is a schedule of its own.
  """

  name: str
  start: int
  end: int
  config: "Config"
  own_schedule: bool


def with_phase(config: Config, phase: PhaseConfig) -> Config:
  """The config with what a phase sets."""
  by_section: dict[str, dict[str, Any]] = {"train": {"phases": ()}}
  schedule: dict[str, Any] = {}
  for path, value in phase.options:
    section_name, _, name = path.rpartition(".")
    if section_name == "optimizer.schedule":
      schedule[name] = value
    else:
      by_section.setdefault(section_name, {})[name] = value
  if schedule:
    by_section.setdefault("optimizer", {})["schedule"] = dataclasses.replace(
      config.optimizer.schedule, **schedule
    )
  changed = {
    name: dataclasses.replace(getattr(config, name), **values)
    for name, values in by_section.items()
  }
  try:
    return dataclasses.replace(config, **changed)
  except ConfigError:
    # Perhaps on another mesh: a run may go on with one.
    alone = {"parallel": ParallelConfig()}
    return dataclasses.replace(config, **(changed | alone))


def require_mesh_fits(config: Config, start: int, end: int) -> None:
  """Refuses to reach a phase which the mesh does not divide.

  Args:
    config: of the run.
    start, end: the steps before and after what is to be trained now.

  Raises:
    ConfigError: naming the phase, and where to stop before it.
  """
  for phase in phases_of(config):
    if phase.end <= start or phase.start >= end:
      continue
    if phase.config.parallel == config.parallel:
      continue
    try:
      dataclasses.replace(phase.config, parallel=config.parallel)
    except ConfigError as e:
      advice = f"stop before it with --stop-at={phase.start}, and go on with "
      raise ConfigError(
        f"phase {phase.name} does not fit on this mesh ({e}); "
        f"{advice if phase.start > start else 'use '}another --config.parallel"
      ) from None


@functools.lru_cache(maxsize=64)
def phases_of(config: Config) -> tuple[Phase, ...]:
  """The phases of a run, in order; one without a name where it has none.

  A phase that begins at or after `train.num_steps` is not there: the run ends
  before it.
  """
  last = config.train.num_steps
  if not config.train.phases:
    return (Phase("", 0, last, config, True),)
  found: list[Phase] = []
  for phase in config.train.phases:
    start = found[-1].end if found else 0
    made = with_phase(config, phase)
    tokens = made.train.batch_size * made.data.seq_len
    steps = phase.steps or math.ceil(phase.tokens / tokens) or last - start
    own = any(path.startswith("optimizer.") for path, _ in phase.options)
    end = min(start + steps, last)
    if start < last:
      found.append(Phase(phase.name, start, end, made, own or not found))
  return tuple(found)


def phase_at(config: Config, step: int) -> Phase:
  """The phase of the step that comes after `step` steps; at the end, the last.

  So a checkpoint after the last step of a phase belongs to the next one.
  """
  phases = phases_of(config)
  return next((p for p in phases if step < p.end), phases[-1])


def config_after(config: Config, step: int) -> Config:
  """What held in the last of the first `step` steps; it has no phases."""
  return phase_at(config, max(step - 1, 0)).config


def schedule_stretches(
  config: Config,
) -> list[tuple[int, int, OptimizerConfig]]:
  """(first step, steps, options) of each schedule of the learning rate.

  A phase that sets options of the optimizer has a schedule of its own, over its
  own steps and those of the phases after it that set none.
  """
  starts = [p for p in phases_of(config) if p.own_schedule]
  ends = [p.start for p in starts[1:]] + [config.train.num_steps]
  return [
    (p.start, end - p.start, p.config.optimizer) for p, end in zip(starts, ends)
  ]
