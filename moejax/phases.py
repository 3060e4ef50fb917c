# SPDX-License-Identifier: Apache-2.0
"""What of a config holds at a step, looked up within the program.

So one program serves all phases of one shape, and a phase switch compiles
nothing that has not been there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import Config, Phase, PhaseConfig, phases_of
from moejax.losses import LossWeights
from moejax.models.rope import rope_frequencies

Array = jax.Array


@flax.struct.dataclass
class AtStep:
  """What holds at a step.

  Attributes:
    loss: weights of the loss terms.
    rope_H: RoPE's frequencies; None are those of the model.
  """

  loss: LossWeights
  rope_H: Array | None = None


def at_step(config: Config, step: Array) -> AtStep:
  """What holds in the step after `step` steps.

  What is the same in all phases is a constant of the program.
  """
  weights = {
    field.name: _look_up(
      config, step, lambda p, name=field.name: getattr(p.config.loss, name)
    )
    for field in dataclasses.fields(LossWeights)
  }
  rope_H = None
  # The model is that of the config itself, which no phase may share.
  models = [config.model, *(p.config.model for p in phases_of(config))]
  if len({(m.rope_theta, m.rope_scaling) for m in models}) > 1:
    rope_H = _look_up(config, step, _frequencies)
  return AtStep(LossWeights(**weights), rope_H)


def shaped_like(config: Config, phase: Phase) -> Config:
  """The config with the shapes of a phase: what its program depends on.

  All phases are in it, in steps and without shapes of their own.
  """
  *earlier, last = phases_of(config)
  lengths = {p.name: p.end - p.start for p in earlier} | {last.name: 0}
  phases = tuple(
    PhaseConfig(p.name, lengths[p.name], 0.0, _without_shapes(p.options))
    for p in config.train.phases
    if p.name in lengths
  )
  shapes = phase.config.train
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, seq_len=phase.config.data.seq_len),
    train=dataclasses.replace(
      config.train, batch_size=shapes.batch_size,
      accumulation_steps=shapes.accumulation_steps, phases=phases,
    ),
  )  # fmt: skip


def _without_shapes(options: tuple[tuple[str, Any], ...]) -> Any:
  shapes = ("train.", "data.")
  return tuple((k, v) for k, v in options if not k.startswith(shapes))


def _look_up(
  config: Config, step: Array, value_of: Callable[[Phase], Any]
) -> Any:
  phases = phases_of(config)
  values = [value_of(phase) for phase in phases]
  if all(np.array_equal(value, values[0]) for value in values):
    return values[0]
  starts = np.array([phase.start for phase in phases[1:]])
  table = jnp.asarray(np.stack(values), jnp.float32)
  return table[(step >= starts).sum()]


def _frequencies(phase: Phase) -> np.ndarray:
  model = phase.config.model
  return rope_frequencies(
    model.rope_dim, model.rope_theta, model.rope_scaling_spec
  )
