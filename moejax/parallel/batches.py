# SPDX-License-Identifier: Apache-2.0
"""Which process reads which rows of a batch, and how they become one array."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moejax.models.placement import TOKENS
from moejax.parallel import rules


def _num_parts(mesh: Mesh) -> int:
  """Into how many parts a batch goes."""
  return math.prod(mesh.shape[axis] for axis in rules.USED["batch"])


def _parts_of_processes(mesh: Mesh) -> list[tuple[int, ...]]:
  """The rows of the smallest batch, one for each part."""
  return rows_of_processes(mesh, _num_parts(mesh))


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
  mesh, me = sharding.mesh, jax.process_index()
  size = len(rows) * _num_parts(mesh) // len(_parts_of_processes(mesh)[me])
  places = rows_of_processes(mesh, size)[me]
  first = {place: i for i, place in enumerate(places)}

  def part(index):
    start, stop, _ = index[0].indices(size)
    here = first[start]  # a device's rows are neighbours
    return rows[here : here + stop - start][(slice(None), *index[1:])]

  return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, part)


def sum_over_readers(mesh: Mesh, value: float) -> float:
  """The sum over processes, of which those with the same rows count once."""
  if jax.process_count() == 1:
    return value
  from jax.experimental import multihost_utils

  # As two halves: arrays of JAX have no 64 bits.
  halves = np.frombuffer(np.float64(value).tobytes(), np.uint32)
  found = multihost_utils.process_allgather(halves)
  values = np.ascontiguousarray(found).view(np.float64)[:, 0]
  readers = dict(zip(_parts_of_processes(mesh), values))
  return float(sum(readers.values()))


def on_one_device(tree: Any) -> Any:
  """A copy of sharded arrays, whole on this process's first device."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    tree = multihost_utils.process_allgather(tree, tiled=True)
  return jax.device_put(tree, jax.local_devices()[0])
