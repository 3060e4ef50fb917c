# SPDX-License-Identifier: Apache-2.0
"""Gathering parts of weights, in stages that a TPU's network is good at."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

Array = jax.Array
Groups = tuple[tuple[int, ...], ...]

# libtpu 0.0.42 gathers along two sides of the torus at most: of three, it makes
# a sum of arrays that are zero but for each device's part, twice the bytes and
# a pass over all. A scattered sum becomes a whole one in the same way, but that
# runs beside other work and a scattered one does not, so gradients are left as
# they are.
_SIDES = 2


def gather(part: Array, mesh: Mesh, axes: tuple[str, ...], dim: int) -> Array:
  """The whole of which each device along `axes` has a part; in `shard_map`.

  Gradients are added up, and scattered, in one stage.

  Args:
    part: this device's.
    mesh: what `axes` are of.
    axes: of the mesh, the major first, as in a PartitionSpec's entry.
    dim: of the array, that is split.
  """
  for axis in reversed(axes):
    part = _gather(axis, dim, stages(mesh, axis), part)
  return part


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather(axis, dim, groups_of_stages, part):
  for groups in groups_of_stages:
    part = jax.lax.all_gather(
      part, axis, axis=dim, tiled=True, axis_index_groups=groups
    )
  return part


def _forward(axis, dim, groups_of_stages, part):
  return _gather(axis, dim, groups_of_stages, part), None


def _backward(axis, dim, groups_of_stages, _, d_whole):
  del groups_of_stages
  return (
    jax.lax.psum_scatter(d_whole, axis, scatter_dimension=dim, tiled=True),
  )


_gather.defvjp(_forward, _backward)


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
