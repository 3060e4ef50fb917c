# SPDX-License-Identifier: Apache-2.0
"""Agreement between the processes of a run; nothing to do if there is one."""

import json
from typing import Any

import jax
import numpy as np

BARRIER_TIMEOUT = 1200  # seconds; as long as Orbax waits


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


def unlike_first(settings: dict[str, Any]) -> list[str]:
  """What process 0 has otherwise, in words; main thread only.

  Args:
    settings: nested dicts of what JSON can say.
  """
  if jax.process_count() == 1:
    return []
  from jax.experimental import multihost_utils

  mine = np.frombuffer(json.dumps(settings).encode(), np.uint8)
  size = from_first(len(mine))
  sent = np.zeros(size, np.uint8)
  if is_first():
    sent = mine
  got = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8))
  here, there = _flat(settings), _flat(json.loads(got))
  return [
    f"{key}={here[key]!r} here, {there[key]!r} in process 0"
    for key in sorted(here.keys() & there.keys())
    if json.dumps(here[key]) != json.dumps(there[key])
  ] or [f"{key}: not in both" for key in sorted(here.keys() ^ there.keys())]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(
    settings, is_leaf=lambda x: not isinstance(x, dict)
  )
  name = jax.tree_util.keystr
  return {name(path, simple=True, separator="."): x for path, x in leaves}


def all_true(value: bool) -> bool:
  """Whether the value is true on all processes; main thread only."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  return bool(np.all(multihost_utils.process_allgather(np.int32(value))))


def barrier(name: str) -> None:
  """Waits for all processes; any thread, as no device takes part."""
  if jax.process_count() == 1:
    return
  from orbax.checkpoint import multihost

  multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_TIMEOUT * 1000)
