# SPDX-License-Identifier: Apache-2.0
"""Every expert on every token: the reference that all others must equal."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routing.base import Routing

Array = jax.Array


def dense(
  expert_fn: Callable[..., Array],
  weights: Any,
  x_TD: Array,
  routing: Routing,
  combine: bool = True,
) -> Array:
  """Computes all E * T pairs, then picks those that the routing names.

  Args:
    expert_fn: `(h_AD, group_sizes_E, weights, None) -> y_AD`.
    weights: the experts' weights, handed through.
    x_TD: tokens.
    routing: assignments; those with expert E contribute nothing.
    combine: False returns one unweighted row per assignment, y_AD.
  """
  T, D = x_TD.shape
  E = routing.num_experts
  h_AD = jnp.tile(x_TD, (E, 1))
  sizes_E = np.full(E, T, np.int32)
  y_ETD = expert_fn(h_AD, sizes_E, weights, None).reshape(E, T, -1)
  somewhere_A = routing.expert_A < E
  expert_A = jnp.where(somewhere_A, routing.expert_A, 0)
  y_AD = jnp.where(somewhere_A[:, None], y_ETD[expert_A, routing.token_A], 0)
  if not combine:
    return y_AD
  weighted_AD = y_AD * routing.weight_A[:, None].astype(y_AD.dtype)
  return (
    jnp.zeros((T, y_AD.shape[-1]), y_AD.dtype)
    .at[routing.token_A]
    .add(weighted_AD)
  )
