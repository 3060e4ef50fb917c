# SPDX-License-Identifier: Apache-2.0
"""Whether devices that hold copies of an array hold the same bits.

A step computes each copy's update from the same numbers, so copies only part
when a device or its memory fails, which no loss shows.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array


def differing_copies(tree: Any) -> list[str]:
  """Paths of the leaves whose copies differ; all processes get the same.

  Args:
    tree: arrays, on one mesh or on one device each.
  """
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    where = leaf.sharding
    if isinstance(where, NamedSharding) and _copied_over(where):
      named[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
  if not named:
    return []
  (mesh,) = {leaf.sharding.mesh for leaf in named.values()}
  specs = tuple(leaf.sharding.spec for leaf in named.values())
  differs = jax.device_get(_comparison(mesh, specs)(*named.values()))
  return list(itertools.compress(named, differs))


def _copied_over(where: NamedSharding) -> tuple[str, ...]:
  """Axes of the mesh along which devices hold copies."""
  used = set()
  for axes in where.spec:
    used |= {axes} if isinstance(axes, str) else set(axes or ())
  sizes = where.mesh.shape
  return tuple(a for a in sizes if a not in used and sizes[a] > 1)


@functools.lru_cache(maxsize=8)
def _comparison(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Any:
  """Compiled: one bool for each array, the same on all devices."""

  def body(*parts):
    differs = []
    for spec, part in zip(specs, parts):
      over = _copied_over(NamedSharding(mesh, spec))
      digest = _digest(part)
      differs.append(jax.lax.pmax(digest, over) != jax.lax.pmin(digest, over))
    everywhere = tuple(mesh.axis_names)
    return jax.lax.pmax(jnp.stack(differs).astype(jnp.int32), everywhere)

  compare = jax.shard_map(
    body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
  )
  return jax.jit(compare)


def _digest(x: Array) -> Array:
  """uint32 that any one changed bit changes."""
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
  words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32).reshape(-1)
  # Times an odd number, modulo 2^32, nothing but zero is zero.
  odd = 2 * jax.lax.iota(jnp.uint32, words.size) + 1
  return (words * odd).sum(dtype=jnp.uint32)
