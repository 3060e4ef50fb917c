# SPDX-License-Identifier: Apache-2.0
"""Dropless: rows sorted by expert, one grouped product, weighted sum.

No expert has a capacity, so nothing is dropped or padded (Gale et al. 2022,
"MegaBlocks"). Where each token has the same number X of assignments, rows move
by permutation in both directions and in the gradient; other routings scatter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.routing.base import Routing

Array = jax.Array


def ragged(
  expert_fn: Callable[..., Array],
  weights: Any,
  x_TD: Array,
  routing: Routing,
  combine: bool = True,
) -> Array:
  """Sorts assignments by expert and computes exactly those.

  Args:
    expert_fn: `(h_AD, group_sizes_E, weights, scale_A) -> y_AD`; rows beyond
      the sum of the group sizes (assignments that go nowhere) may come back as
      anything, all others times their scale if one is given.
    weights: the experts' weights, handed through.
    x_TD: tokens.
    routing: assignments; those with expert E contribute nothing.
    combine: False returns one unweighted row per assignment, y_AD.
  """
  h_AD, sorting = gather_rows(x_TD, routing)
  scale_A = sorted_weights(sorting, routing) if combine else None
  y_AD = expert_fn(h_AD, sorting.sizes_E, weights, scale_A)
  return return_rows(y_AD, sorting, routing, x_TD.shape[0], combine)


class Sorting(NamedTuple):
  """How assignments lie sorted by expert: `sorted = x[order]`, and back.

  Attributes:
    order_A: which assignment each sorted row is.
    place_A: where each assignment's row is: the inverse.
    sizes_E: rows of each expert; those that go nowhere come last, in no group.
  """

  order_A: Array
  place_A: Array
  sizes_E: Array


def gather_rows(x_TD: Array, routing: Routing) -> tuple[Array, Sorting]:
  """A row for each assignment, sorted by expert."""
  sorting = sort_by_expert(routing.expert_A, routing.num_experts)
  X = routing.experts_per_token
  if X:
    return gather_sorted(x_TD, sorting.order_A, sorting.place_A, X), sorting
  return x_TD[routing.token_A[sorting.order_A]], sorting


def sorted_weights(sorting: Sorting, routing: Routing) -> Array:
  """The combine weight of each sorted row."""
  return permute(routing.weight_A, sorting.order_A, sorting.place_A)


def return_rows(
  y_AD: Array, sorting: Sorting, routing: Routing, T: int, combine: bool
) -> Array:
  """Sorted rows in the assignments' order, or summed by token, [T, ...].

  Rows of assignments that go nowhere count as zeros, whatever they hold.
  """
  somewhere_A = routing.expert_A < routing.num_experts
  X = routing.experts_per_token
  if combine and X:
    return sum_by_token(y_AD, sorting.order_A, sorting.place_A, somewhere_A, X)
  y_AD = permute(y_AD, sorting.place_A, sorting.order_A)
  y_AD = jnp.where(somewhere_A[:, None], y_AD, 0)
  if not combine:
    return y_AD
  y_TD = jnp.zeros((T, y_AD.shape[-1]), y_AD.dtype)
  return y_TD.at[routing.token_A].add(y_AD)


def sort_by_expert(expert_A: Array, num_experts: int) -> Sorting:
  """The sorting of assignments; expert E is nowhere.

  It is stable, so the order within an expert is the tokens' own.
  """
  A = expert_A.shape[0]
  order_A = _stable_order(expert_A, A, num_experts)
  place_A = (
    jnp.zeros(A, jnp.int32)
    .at[order_A]
    .set(jnp.arange(A, dtype=jnp.int32), unique_indices=True)
  )
  # Counting by comparison: A x E booleans are cheaper than a scatter.
  sizes_E = (expert_A[:, None] == jnp.arange(num_experts)[None]).sum(
    0, jnp.int32
  )
  return Sorting(order_A, place_A, sizes_E)


def _stable_order(expert_A: Array, A: int, E: int) -> Array:
  if (E + 1) * A > jnp.iinfo(jnp.int32).max:
    return jnp.argsort(expert_A, stable=True).astype(jnp.int32)
  # Expert and place in one number: a sort without a payload takes a quarter of
  # the time on a CPU, and equal keys do not occur.
  return jnp.sort(expert_A * A + jnp.arange(A, dtype=jnp.int32)) % A


@jax.custom_vjp
def permute(x_AD: Array, to_A: Array, back_A: Array) -> Array:
  """`x[to]` for a permutation whose inverse is `back`."""
  del back_A
  return x_AD[to_A]


def _permute_fwd(x_AD, to_A, back_A):
  return x_AD[to_A], back_A


def _permute_bwd(back_A, dy_AD):
  # A gather, where autodiff would emit a scatter-add.
  return dy_AD[back_A], None, None


permute.defvjp(_permute_fwd, _permute_bwd)


def gather_sorted(x_TD: Array, order_A: Array, place_A: Array, X: int) -> Array:
  """Row `a` of the result is token `order[a] // X`."""
  return _gather_sorted(X, x_TD, order_A, place_A)


def _gather(X, x_TD, order_A, place_A):
  del place_A
  return x_TD[order_A // X]


_gather_sorted = jax.custom_vjp(_gather, nondiff_argnums=(0,))


def _gather_fwd(X, x_TD, order_A, place_A):
  return _gather(X, x_TD, order_A, place_A), place_A


def _gather_bwd(X, place_A, dh_AD):
  return dh_AD[_by_choice(place_A, X)].sum(0), None, None


_gather_sorted.defvjp(_gather_fwd, _gather_bwd)


def sum_by_token(
  y_AD: Array, order_A: Array, place_A: Array, somewhere_A: Array, X: int
) -> Array:
  """The sum of each token's X rows, without those that go nowhere.

  Gradients of rows that go nowhere are of no meaning: no expert has them.
  """
  return _sum_by_token(X, y_AD, order_A, place_A, somewhere_A)


def _sum(X, y_AD, order_A, place_A, somewhere_A):
  del order_A
  y_XTD = y_AD[_by_choice(place_A, X)]
  return jnp.where(_by_choice(somewhere_A, X)[..., None], y_XTD, 0).sum(0)


_sum_by_token = jax.custom_vjp(_sum, nondiff_argnums=(0,))


def _sum_fwd(X, y_AD, order_A, place_A, somewhere_A):
  return _sum(X, y_AD, order_A, place_A, somewhere_A), order_A


def _sum_bwd(X, order_A, dy_TD):
  return dy_TD[order_A // X], None, None, None


_sum_by_token.defvjp(_sum_fwd, _sum_bwd)


def _by_choice(x_A: Array, X: int) -> Array:
  """`[X, T]`: a TPU would copy all rows to bring X next to last."""
  return x_A.reshape(-1, X).T
