# SPDX-License-Identifier: Apache-2.0
"""Whether a run fits into memory: refused at the start, not killed later."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from moejax.config import Config, Phase
from moejax.errors import ConfigError
from moejax.evaluate import jitted_eval_step, micro_rows
from moejax.hardware import machine_memory
from moejax.models import Transformer
from moejax.models.placement import TOKENS
from moejax.parallel import compile_overlapped
from moejax.phases import shaped_like
from moejax.progress import format_bytes
from moejax.step import (
  BATCH_KEYS,
  TrainState,
  abstract_state,
  make_train_step,
  state_shardings,
)


def compile_phases(
  config: Config, model: Transformer, mesh: Mesh, phases: Sequence[Phase]
) -> dict[Phase, jax.stages.Compiled]:
  """The step of each phase; phases of one shape share it.

  Raises:
    ConfigError: more memory than there is, naming the phase.
  """
  found: dict[Phase, jax.stages.Compiled] = {}
  by_shape: dict[Config, jax.stages.Compiled] = {}
  for phase in phases:
    shaped = shaped_like(config, phase)
    if shaped not in by_shape:
      try:
        by_shape[shaped] = compile_step(shaped, model, mesh)
      except ConfigError as e:
        where = f"phase {phase.name}: " if phase.name else ""
        raise ConfigError(f"{where}{e}") from e
    found[phase] = by_shape[shaped]
  return found


def compile_step(
  config: Config, model: Transformer, mesh: Mesh
) -> jax.stages.Compiled:
  """The compiled step; says what memory it takes on each device.

  Runs of one process that differ in their seed alone share it.

  Args:
    config, model: what is trained.
    mesh: where.

  Raises:
    ConfigError: more memory than there is.
  """
  platform = jax.local_devices()[0].platform
  compiled = _step_of_any_seed(dataclasses.replace(config, seed=0), model, mesh)
  needed = peak_bytes(compiled, platform)
  require_memory(
    needed, "a training step", "lower train.batch_size or data.seq_len, raise "
    "train.accumulation_steps, or set model.remat=full",
    mesh.local_mesh.size,
  )  # fmt: skip
  each = " on each device" if mesh.size > 1 else ""
  print(f"memory: a step takes {format_bytes(needed)}{each}", flush=True)
  return compiled


@functools.lru_cache(maxsize=32)
def _step_of_any_seed(config: Config, model: Transformer, mesh: Mesh):
  shardings = state_shardings(config, model, mesh)
  state = abstract_state(config, model, shardings)
  platform = jax.local_devices()[0].platform
  return compile_for_platform(config, model, state, platform)


def compile_for_platform(
  config: Config, model: Transformer, state: TrainState, platform: str
) -> jax.stages.Compiled:
  """The compiled step; its devices need not be here."""
  lowered = lower_step(config, model, state)
  if config.parallel.num_devices == 1:
    return lowered.compile()
  return compile_overlapped(lowered, platform, config.parallel.overlap)


def peak_bytes(compiled: Any, platform: str) -> int:
  """The most that a program takes on a device, arguments included."""
  stats = compiled.memory_analysis()
  if platform == "tpu":
    # Temporaries are counted as if no two of them shared a place: a step of
    # 40.5 GiB in all was accepted for chips with 31.25.
    return stats.peak_memory_in_bytes
  needed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  return needed + stats.output_size_in_bytes - stats.alias_size_in_bytes


def lower_step(config: Config, model: Transformer, state: TrainState):
  """The step of abstract arguments, ready to be compiled."""
  shape = config.train.batch_size, config.data.seq_len
  batch = _abstract_batch(shape, _batch_sharding(model, state))
  where = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(
    make_train_step(config, model), donate_argnums=0,
    # The state stays where it is, so that the next step fits on it.
    out_shardings=(where, where.step),
  )  # fmt: skip
  return step.lower(state, batch)


def _batch_sharding(model: Transformer, state: TrainState) -> Sharding:
  if len(state.step.sharding.device_set) == 1:
    return state.step.sharding  # the one device, which need not be here
  return model.placement.sharding(TOKENS)


def _abstract_batch(
  shape: tuple[int, int], where: Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
  array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  return dict.fromkeys(BATCH_KEYS, array("int32")) | {
    "loss_mask": array("bool")
  }


def check_evaluation_fits(
  models: Mapping[Phase, Transformer],
  phases: Sequence[Phase],
  state: TrainState,
) -> None:
  """Refuses validation that has no room beside the training state.

  Where it may take more than a step does: with rows of its own, or with room
  for all of them where training drops what is beyond `parallel.receive_factor`.

  Args:
    models: what evaluates, by phase.
    phases: that are left.
    state: shapes, dtypes and shardings.

  Raises:
    ConfigError: more memory than there is.
  """
  checked = set()
  for phase in phases:
    config, model = phase.config, models[phase]
    rows = micro_rows(config)
    shape = rows, config.data.seq_len
    more = rows > config.train.batch_size // config.train.accumulation_steps
    sets = any(entry.every for entry in config.eval.sets)
    if not (config.eval.every or sets) or shape in checked:
      continue
    if not (more or config.parallel.receive_factor):
      continue
    checked.add(shape)
    where = _batch_sharding(model, state)
    lowered = jitted_eval_step(config, model).lower(
      state.variables, _abstract_batch(shape, where)
    )
    platform = jax.local_devices()[0].platform
    beside = device_bytes(state) - device_bytes(state.variables)
    what = f"evaluating {rows} rows at a time"
    if config.parallel.receive_factor:
      what += ", where each device has room for all of them,"
    require_memory(
      peak_bytes(lowered.compile(), platform) + beside, what,
      "lower eval.batch_size", _local_devices(state),
    )  # fmt: skip


def check_state_fits(state: TrainState) -> None:
  """Refuses a model whose training state alone is more than the memory.

  Args:
    state: shapes, dtypes and shardings.
  """
  # A gradient is as large as its parameter.
  needed = device_bytes(state) + device_bytes(state.params)
  require_memory(
    needed, "the training state", "make the model smaller, or split it by "
    "parallel.fsdp", _local_devices(state),
  )  # fmt: skip


def _local_devices(state: TrainState) -> int:
  """How many devices of this host a run uses."""
  return len(state.step.sharding.addressable_devices)


def device_bytes(state: Any) -> int:
  """Bytes of a tree's parts on one device."""
  parts = (
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(state)
  )
  return sum(parts)


def require_memory(needed: int, what: str, fix: str, devices: int = 1) -> None:
  """Refuses what is beyond a device's memory, or its share of the host's.

  Args:
    needed: bytes on each device.
    what, fix: for the message.
    devices: of this host, that the run uses.

  Raises:
    ConfigError: says both numbers and the fix.
  """
  device = jax.local_devices()[0]
  has = device_memory(device)
  if has is None:
    return
  if device.platform == "cpu":  # its devices share the host's memory
    has //= devices
  if needed > has:
    each = f"each of {devices} devices" if devices > 1 else "this machine"
    raise ConfigError(
      f"{what} needs {format_bytes(needed)}, {each} has {format_bytes(has)}; "
      f"{fix}"
    )


def device_memory(device: jax.Device) -> int | None:
  """Bytes that programs may use; None where nobody says."""
  if device.platform == "cpu":
    try:
      return machine_memory()
    except (ValueError, OSError):
      return None
  stats = device.memory_stats()
  return stats["bytes_limit"] if stats and "bytes_limit" in stats else None
