# SPDX-License-Identifier: Apache-2.0
"""Gathering parts of weights, in stages that a TPU's network is good at."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

Array = jax.Array
Groups = tuple[tuple[int, ...], ...]

# libtpu 0.0.42 gathers along two sides of the torus at most; a gather along
# three becomes a sum of arrays that are zero but for each device's part, and a
# scattered sum becomes a whole one: twice the bytes, and the memory of all.
_SIDES = 2


def gather(part: Array, mesh: Mesh, axes: tuple[str, ...], dim: int) -> Array:
  """The whole of which each device along `axes` has a part; in `shard_map`.

  Gradients are added up and scattered the same way back.

  Args:
    part: this device's.
    mesh: what `axes` are of.
    axes: of the mesh, the major first, as in a PartitionSpec's entry.
    dim: of the array, that is split.
  """
  for axis in reversed(axes):
    for groups in stages(mesh, axis):
      part = jax.lax.all_gather(
        part, axis, axis=dim, tiled=True, axis_index_groups=groups
      )
  return part


@functools.lru_cache
def stages(mesh: Mesh, axis: str) -> tuple[Groups | None, ...]:
  """Groups of places along a mesh axis, gathered one after another.

  One stage of all places, unless they lie along three sides of a torus: then
  first along one of them, while the parts are small.
  """
  n = mesh.shape[axis]
  along = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1)
  line = along.reshape(-1, n)[0]
  if _sides(line) <= _SIDES:
    return (None,)
  for near in range(2, n):
    if n % near or _sides(line[:near]) > 1 or _sides(line[::near]) > _SIDES:
      continue
    places = np.arange(n).reshape(n // near, near)
    return _tuples(places), _tuples(places.T)
  return (None,)


def _sides(devices: np.ndarray) -> int:
  """Of the torus, along which devices differ; 0 where there is none."""
  places = [getattr(device, "coords", ()) for device in devices]
  return sum(len(set(side)) > 1 for side in zip(*places))


def _tuples(places: np.ndarray) -> Groups:
  return tuple(tuple(map(int, group)) for group in places)
