# SPDX-License-Identifier: Apache-2.0
"""Buffers of fixed size: each expert has as many rows as its capacity.

Lepikhin et al. 2020, "GShard" (arXiv:2006.16668). Shapes know nothing of the
loads, so experts compute one batched product, at the price of empty rows. Needs
a router with a capacity (`switch`, `recycle`, `expert_choice`); which tokens
find no place is the router's decision, so the result is that of all dispatches.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.dispatch.ragged import ragged, sort_by_expert
from moejax.routing.base import Routing

Array = jax.Array


def padded(
  expert_fn: Callable[..., Array],
  weights: Any,
  x_TD: Array,
  routing: Routing,
  combine: bool = True,
) -> Array:
  """Puts assignments in their expert's buffer and computes all of it.

  A routing without a capacity, as in evaluation, is dispatched by `ragged`.

  Args:
    expert_fn: `(h_AD, group_sizes_E, weights, scale_A) -> y_AD`; the sizes are
      NumPy's and all the same.
    weights: the experts' weights, handed through.
    x_TD: tokens.
    routing: assignments; those with expert E contribute nothing.
    combine: False returns one unweighted row per assignment, y_AD.
  """
  C, E = routing.capacity, routing.num_experts
  if not C:
    return ragged(expert_fn, weights, x_TD, routing, combine)
  T, A = x_TD.shape[0], routing.token_A.shape[0]
  row_A, assignment_C = _rows(routing.expert_A, E, C)
  # Row A of tokens and weights is the empty one.
  token_C = jnp.append(routing.token_A, T)[assignment_C]
  row_TX = row_A.reshape(T, -1) if routing.experts_per_token else None
  h_CD = _spread(x_TD, row_TX, token_C)
  scale_C = jnp.append(routing.weight_A, 0.0)[assignment_C] if combine else None
  y_CD = expert_fn(h_CD, np.full(E, C, np.int32), weights, scale_C)
  if not combine:
    return _collect(y_CD, row_A[:, None], assignment_C, A)
  return _collect(y_CD, row_TX, token_C, T)


def _rows(expert_A: Array, E: int, C: int) -> tuple[Array, Array]:
  """The row of each assignment, E C for none, and the assignment of each row.

  Rows without one have assignment A.
  """
  A = expert_A.shape[0]
  sorting = sort_by_expert(expert_A, E)
  starts_E = jnp.cumsum(sorting.sizes_E) - sorting.sizes_E
  place_EC = starts_E[:, None] + jnp.arange(C)[None]
  filled_EC = jnp.arange(C)[None] < sorting.sizes_E[:, None]
  order_A = jnp.append(sorting.order_A, A)
  assignment_C = order_A[jnp.where(filled_EC, place_EC, A).reshape(-1)]
  rank_A = sorting.place_A - jnp.append(starts_E, 0)[expert_A]
  # Never into the next expert's buffer, should the capacity not be kept.
  there_A = (expert_A < E) & (rank_A < C)
  row_A = jnp.where(there_A, expert_A * C + rank_A, E * C)
  return row_A, assignment_C


def _spread(x_TD: Array, row_TX: Array | None, token_C: Array) -> Array:
  """Row r of the result is token `token[r]`, zeros where there is none."""
  if row_TX is None:
    return _take(x_TD, token_C)
  return _spread_by_token(x_TD, row_TX, token_C)


def _collect(
  y_CD: Array, row_TX: Array | None, token_C: Array, T: int
) -> Array:
  """The sum of each token's rows."""
  if row_TX is None:
    y_TD = jnp.zeros((T, y_CD.shape[1]), y_CD.dtype)
    return y_TD.at[token_C].add(y_CD, mode="drop")
  return _collect_by_token(y_CD, row_TX, token_C)


# Each is the other's transpose, and both are gathers, where autodiff would
# emit a scatter-add.


@jax.custom_vjp
def _spread_by_token(x_TD, row_TX, token_C):
  del row_TX
  return _take(x_TD, token_C)


@jax.custom_vjp
def _collect_by_token(y_CD, row_TX, token_C):
  del token_C
  return _take(y_CD, row_TX.T).sum(0)


def _spread_fwd(x_TD, row_TX, token_C):
  return _spread_by_token(x_TD, row_TX, token_C), (row_TX, token_C)


def _spread_bwd(residuals, d_CD):
  return _collect_by_token(d_CD, *residuals), None, None


def _collect_fwd(y_CD, row_TX, token_C):
  return _collect_by_token(y_CD, row_TX, token_C), (row_TX, token_C)


def _collect_bwd(residuals, d_TD):
  return _spread_by_token(d_TD, *residuals), None, None


_spread_by_token.defvjp(_spread_fwd, _spread_bwd)
_collect_by_token.defvjp(_collect_fwd, _collect_bwd)


def _take(rows: Array, index: Array) -> Array:
  return rows.at[index].get(mode="fill", fill_value=0)
