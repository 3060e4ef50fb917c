# SPDX-License-Identifier: Apache-2.0
"""Whether a run fits into memory: refused at the start, not killed later."""

import os

import jax

from moejax import runs
from moejax.config import Config
from moejax.errors import ConfigError
from moejax.models import Transformer, count
from moejax.progress import format_bytes
from moejax.step import BATCH_KEYS, init_state, make_train_step


def compile_step(config: Config, model: Transformer):
  """The compiled step; says what memory it takes.

  Raises:
    ConfigError: more than there is.
  """
  state = runs.on_device(jax.eval_shape(lambda: init_state(config, model)))
  shape = config.train.batch_size, config.data.seq_len
  batch = dict.fromkeys(BATCH_KEYS, jax.ShapeDtypeStruct(shape, "int32"))
  batch["loss_mask"] = jax.ShapeDtypeStruct(shape, "bool")
  batch = runs.on_device(batch)
  step = jax.jit(make_train_step(config, model), donate_argnums=0)
  compiled = step.lower(state, batch).compile()
  stats = compiled.memory_analysis()
  needed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  needed += stats.output_size_in_bytes - stats.alias_size_in_bytes
  require_memory(
    needed, "a training step", "lower train.batch_size or data.seq_len, raise "
    "train.accumulation_steps, or set model.remat=full",
  )  # fmt: skip
  print(f"memory: a step takes {format_bytes(needed)}", flush=True)
  return compiled


def check_state_fits(config: Config) -> None:
  """Refuses a model whose training state alone is more than the memory."""
  # float32 parameters, gradients and the two moments of AdamW.
  needed = 16 * count(config.model).num_params
  require_memory(needed, "the training state", "make the model smaller")


def require_memory(needed: int, what: str, fix: str) -> None:
  """Refuses what is beyond the first device's memory, or the host's on a CPU.

  Raises:
    ConfigError: says both numbers and the fix.
  """
  has = device_memory(jax.devices()[0])
  if has is not None and needed > has:
    raise ConfigError(
      f"{what} needs {format_bytes(needed)}, this machine has "
      f"{format_bytes(has)}; {fix}"
    )


def device_memory(device: jax.Device) -> int | None:
  """Bytes that programs may use; None where nobody says."""
  if device.platform == "cpu":
    try:
      return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
      return None
  stats = device.memory_stats()
  return stats["bytes_limit"] if stats and "bytes_limit" in stats else None
