# SPDX-License-Identifier: Apache-2.0
"""Names, shapes and dtypes of a state's leaves, and what differs in them."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import CheckpointError

MAX_LISTED = 40  # differing leaves in one message


@dataclasses.dataclass(frozen=True)
class Leaf:
  """What has to agree between a checkpoint and the state that it fills."""

  shape: tuple[int, ...]
  dtype: str

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def named_leaves(tree: Any) -> dict[str, Any]:
  """Leaves by path, such as `opt_state/0/mu/embed`.

  Raises:
    CheckpointError: two leaves of one name, a leaf that is no array, or a tree
      that is a bare array.
  """
  leaves = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
      raise CheckpointError(
        f"state leaf {name!r} is a {type(leaf).__name__}, not an array; make "
        "it one with jnp.asarray"
      )
    # Names are folders too.
    if not re.fullmatch(r"\w[\w.+-]*", name.partition("/")[0]):
      raise CheckpointError(
        f"state leaf {name!r}: the state needs top-level keys made of letters, "
        "digits and _.+-"
      )
    if name in leaves:
      raise CheckpointError(f"two state leaves have the name {name!r}")
    leaves[name] = leaf
  # Orbax joins names with dots.
  dotted = {name.replace("/", ".") for name in leaves}
  if len(dotted) != len(leaves):
    raise CheckpointError(
      "two state leaves have names that differ only in '/' against '.'"
    )
  return leaves


def describe(tree: Any) -> dict[str, Leaf]:
  """Shape and dtype of each leaf by name."""
  return {
    name: Leaf(tuple(leaf.shape), str(leaf.dtype))
    for name, leaf in named_leaves(tree).items()
  }


def as_stored(abstract: Any, stored: Mapping[str, Leaf]) -> Any:
  """The tree with the dtypes of `stored` where both are floating-point."""
  floating = lambda dtype: jnp.issubdtype(dtype, jnp.floating)

  def change(name: str, leaf: Any) -> Any:
    if name not in stored or not floating(leaf.dtype):
      return leaf
    dtype = jnp.dtype(stored[name].dtype)
    if not floating(dtype):
      return leaf
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)

  named = named_leaves(abstract)
  changed = [change(name, leaf) for name, leaf in named.items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), changed)


def item_of(name: str) -> str:
  """The top-level key of a leaf, which is stored as an item of its own."""
  return name.partition("/")[0]


def num_bytes(tree: Any) -> int:
  """Bytes of all leaves, over all processes."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.eval_shape(jax.random.key_data, leaf)
    total += leaf.size * leaf.dtype.itemsize
  return total


def compare(
  wanted: Mapping[str, Leaf], stored: Mapping[str, Leaf], where: str
) -> None:
  """Checks that both have the same leaves.

  Raises:
    CheckpointError: lists each differing leaf with both shapes and dtypes.
  """
  lines = []
  for name in sorted(wanted.keys() | stored.keys()):
    if name not in stored:
      lines.append(f"{name}: not in the checkpoint, wanted {wanted[name]}")
    elif name not in wanted:
      lines.append(f"{name}: {stored[name]} in the checkpoint, not wanted")
    elif wanted[name] != stored[name]:
      lines.append(
        f"{name}: {stored[name]} in the checkpoint, wanted {wanted[name]}"
      )
  if lines:
    rest = len(lines) - MAX_LISTED
    listed = lines[:MAX_LISTED] + ([f"... and {rest} more"] if rest > 0 else [])
    raise CheckpointError(
      f"{where} does not fit: {len(lines)} leaves differ (nothing is cast or "
      "filled in silently); use the config that wrote it, or another workdir"
      + "".join(f"\n  {line}" for line in listed)
    )


def state_digest(state: Any) -> str:
  """SHA-256 of all leaves in path order, names, dtypes and shapes included.

  It is the same for any sharding. All processes have to call it together, as
  arrays that are spread over processes are gathered.
  """
  digest = hashlib.sha256()
  leaves = named_leaves(state)
  for name in sorted(leaves):
    leaf = leaves[name]
    digest.update(f"{name} {leaf.dtype} {tuple(leaf.shape)}\n".encode())
    digest.update(np.ascontiguousarray(_on_host(leaf)).tobytes())
  return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    from jax.experimental import multihost_utils

    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)
