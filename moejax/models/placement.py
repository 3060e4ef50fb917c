# SPDX-License-Identifier: Apache-2.0
"""How arrays lie on devices, in names that say what an axis is.

Models speak of logical axes only; `moejax.parallel` knows which of a mesh's
axes each is split over.

of activations  batch, tokens, heads, kv_heads, mlp, expert, and
                spread_tokens: tokens split as far as they can be,
                heads_of_rows: heads, where rows are whole instead
of parameters   embed, vocab (split where they are stored, whole where they are
                used), heads, kv_heads, mlp, expert, and mlp_rows: hidden
                channels of experts' output weights, split further where stored
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as Axes

from moejax.routing import Routing

__all__ = ["Axes", "OneDevice", "Partial", "STREAM", "TABLE", "TOKENS"]

Array = jax.Array

TOKENS = Axes("batch", "tokens")
STREAM = Axes("batch", "tokens", None)
TABLE = Axes("vocab", "embed")


@dataclasses.dataclass(frozen=True)
class Partial:
  """Axes of a result of which each device has only a summand.

  Attributes:
    axes: of the result.
    over: logical axes that were summed over, each device its part.
  """

  axes: Axes
  over: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class OneDevice:
  """Nothing is split."""

  def reader(self, batch_size: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Which rows of a global batch each reader of data takes.

    Returns:
      The number of this process's reader, and the rows of each of them.
    """
    return 0, (tuple(range(batch_size)),)

  def sum_over_readers(self, value: float) -> float:
    """The sum of what each reader of data found in its rows."""
    return value

  def sharding(self, axes: Axes) -> jax.sharding.Sharding:
    """Where an array of these axes lies while it is used."""
    del axes
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

  def put(self, rows: np.ndarray, axes: Axes) -> Array:
    """This process's rows of a global batch on the devices."""
    del axes
    return jnp.asarray(rows)

  def parts(self, axis: str) -> int:
    """How many parts of this axis devices have."""
    del axis
    return 1

  def constrain(self, x: Array, axes: Axes) -> Array:
    """`x`, lying on the devices as `axes` say."""
    del axes
    return x

  def local(
    self, function: Callable[..., Any], in_axes: Any, out_axes: Any
  ) -> Callable[..., Any]:
    """`function` run by each device on its part of the arguments.

    Args:
      function: of arrays; must be the same maths on any part.
      in_axes: a tuple like the arguments, or a prefix of their trees, with
        `Axes`. What is not named comes in whole, and `embed`
        and `vocab` as well.
      out_axes: like the result, with `Axes` or `Partial`.
    """
    del in_axes, out_axes
    return function

  def admit(self, routing: Routing) -> Routing:
    """The routing as far as the devices have room for it; called in `local`."""
    return routing
