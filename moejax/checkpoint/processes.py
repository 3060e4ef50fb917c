# SPDX-License-Identifier: Apache-2.0
"""Agreement between the processes of a run; nothing to do if there is one."""

import json
from typing import Any

import jax
import numpy as np


def index_and_count() -> tuple[int, int]:
  return jax.process_index(), jax.process_count()


def is_first() -> bool:
  return jax.process_index() == 0


def from_first(value: int) -> int:
  """Process 0's value, on all; main thread only (it uses the devices)."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def settings_of_first(settings: dict[str, Any]) -> dict[str, Any]:
  """Process 0's, on all; main thread only.

  Args:
    settings: this process's, as JSON can say them.
  """
  if jax.process_count() == 1:
    return settings
  from jax.experimental import multihost_utils

  mine = np.frombuffer(json.dumps(settings).encode(), np.uint8)
  size = from_first(len(mine))
  sent = mine if is_first() else np.zeros(size, np.uint8)
  got = multihost_utils.broadcast_one_to_all(sent)
  return json.loads(np.asarray(got, np.uint8).tobytes())


def all_true(value: bool) -> bool:
  """Whether the value is true on all processes; main thread only."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.int32(value))))


def from_all(values: np.ndarray) -> np.ndarray:
  """Every process's, one after the other; main thread only.

  Args:
    values: as many on each.
  """
  if jax.process_count() == 1:
    return values
  from jax.experimental import multihost_utils

  gathered = multihost_utils.process_allgather(values)
  return np.asarray(gathered).reshape(-1, *values.shape[1:])


def barrier(name: str, timeout: float) -> None:
  """Waits so many seconds for all processes.

  Any thread, as no device takes part.
  """
  if jax.process_count() == 1:
    return
  from orbax.checkpoint import multihost

  multihost.get_barrier_sync_fn()(key=name, timeout_ms=int(timeout * 1000))
