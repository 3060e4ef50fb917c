# SPDX-License-Identifier: Apache-2.0
"""Which axes of the mesh a logical axis is split over.

Two tables: where things lie while they are used, and what beyond that a
parameter (and its optimizer state) is split over while it is stored. A mesh
axis splits one axis of an array at most; the first table goes first.
"""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.errors import ConfigError

USED = {
  "batch": ("data", "fsdp", "expert"),
  "tokens": ("sequence",),
  "spread_tokens": ("sequence", "tensor"),
  "expert": ("expert",),
  "heads": ("tensor",),
  "heads_of_rows": ("tensor", "sequence"),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "mlp_rows": ("tensor",),
}
STORED = {
  "embed": ("fsdp", "expert"),
  "vocab": ("tensor",),
  # Of experts, whose last axis should stay whole: a TPU pads it to 128.
  "mlp_rows": ("fsdp", "expert"),
}


def used(axes: PartitionSpec) -> PartitionSpec:
  """Mesh axes of an array of these logical axes while it is used."""
  return PartitionSpec(*(_entry(_used(x)) for x in axes))


def stored(axes: PartitionSpec) -> PartitionSpec:
  """The same while it is stored; differs for parameters alone."""
  taken = {m for x in axes for m in _used(x)}
  entries = []
  for axis in axes:
    more = STORED[axis] if axis in STORED else ()
    free = tuple(m for m in more if m not in taken)
    taken |= set(free)
    entries.append(_entry(_used(axis) + free))
  return PartitionSpec(*entries)


def _used(axis: str | None) -> tuple[str, ...]:
  return USED[axis] if axis in USED else ()


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """An entry of a PartitionSpec as a tuple."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def shardings(mesh: Mesh, boxed: Any, beyond: tuple[str, ...] = ()) -> Any:
  """How each leaf of a state lies on the mesh while it is stored.

  Args:
    mesh: the devices.
    boxed: a tree of `ShapeDtypeStruct`s, parameters and what follows them in
      Flax's boxes of logical axes; leaves without a box are replicated.
    beyond: mesh axes that split a leaf further, where they divide it.

  Raises:
    ConfigError: a parameter's dimension does not divide.
  """
  specs = nn.get_partition_spec(boxed)
  shapes = nn.unbox(boxed)

  def of_leaf(path, shape, spec):
    spec = stored(spec)
    _check(jax.tree_util.keystr(path, simple=True, separator="/"), shape, spec)
    return NamedSharding(mesh, _split_further(mesh, shape.shape, spec, beyond))

  def _check(name: str, leaf: Any, spec: PartitionSpec) -> None:
    for size, entry in zip(leaf.shape, spec):
      ways = math.prod(mesh.shape[axis] for axis in mesh_axes(entry))
      if size % ways:
        names = " * ".join(f"parallel.{axis}" for axis in mesh_axes(entry))
        below = size - size % ways
        raise ConfigError(
          f"{name}, {leaf.shape}: {size} does not divide by {names} = {ways}; "
          f"use {below or ways} or {below + ways}, or another mesh"
        )

  return jax.tree_util.tree_map_with_path(of_leaf, shapes, specs)


def _split_further(
  mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec,
  beyond: tuple[str, ...],
) -> PartitionSpec:  # fmt: skip
  """A spec with `beyond` at the largest dimension that divides by it."""
  entries = [mesh_axes(e) for e in spec]
  entries += [()] * (len(shape) - len(entries))
  ways = lambda axes: math.prod(mesh.shape[a] for a in axes)
  # The last one comes last: a TPU pads it to 128.
  last = len(shape) - 1
  for dim in sorted(range(last + 1), key=lambda d: (d == last, -shape[d])):
    if shape[dim] % ways(entries[dim] + beyond) == 0:
      entries[dim] += beyond
      break
  return PartitionSpec(*map(_entry, entries))


def _entry(axes: tuple[str, ...]) -> tuple[str, ...] | None:
  return axes or None
