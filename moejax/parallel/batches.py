# SPDX-License-Identifier: Apache-2.0
"""Which process reads which rows of a batch, and how they become one array."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moejax.models.placement import TOKENS
from moejax.parallel import rules


def rows_of_processes(mesh: Mesh, batch_size: int) -> list[tuple[int, ...]]:
  """For each process the rows of a global batch that its devices hold."""
  sharding = NamedSharding(mesh, rules.used(TOKENS))
  # One column for each part of a row.
  shape = (batch_size, mesh.shape["sequence"])
  rows: dict[int, set[int]] = {}
  for device, (part, _) in sharding.devices_indices_map(shape).items():
    mine = rows.setdefault(device.process_index, set())
    mine.update(range(*part.indices(batch_size)))
  return [tuple(sorted(rows[process])) for process in sorted(rows)]


def to_global(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """The global array of which each process has its own rows.

  Args:
    rows: those of `rows_of_processes`, in that order.
    sharding: of [B, ...]; B follows from all processes' rows.
  """
  if jax.process_count() == 1:
    return jax.device_put(rows, sharding)
  return jax.make_array_from_process_local_data(sharding, rows)


def on_one_device(tree: Any) -> Any:
  """A copy of sharded arrays, whole on this process's first device."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    tree = multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_put(tree, jax.local_devices()[0])
