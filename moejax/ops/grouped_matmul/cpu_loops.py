# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul in plain XLA loops: for a CPU without a BLAS to call.

Each group is walked in tiles of rows, and the rest of it is one tile of the
next size class. Groups are written in ascending order, so a tile that overhangs
its group is put right by the next one, and no masks are needed.
"""

import jax
import jax.numpy as jnp

_TILES = (8, 64, 256)  # rows; the last one is for the bulk


def gmm(lhs_AD, rhs_EDF, group_sizes_E):
  """`lhs_AD @ rhs_EDF[group]` -> `[A, F]`; zeros beyond the last group."""
  return _gmm(lhs_AD, rhs_EDF, group_sizes_E, contract=0)


def gmm_transposed(d_out_AF, rhs_EDF, group_sizes_E):
  """`d_out_AF @ rhs_EDF[group].T` -> `[A, D]`; zeros beyond the last group."""
  return _gmm(d_out_AF, rhs_EDF, group_sizes_E, contract=1)


def tgmm(lhs_AD, d_out_AF, group_sizes_E, dtype):
  """`lhs_AD[group].T @ d_out_AF[group]` -> `[E, D, F]`; zeros if empty."""
  lhs_AD, d_out_AF = _pad(lhs_AD), _pad(d_out_AF)

  def one_group(start, size):
    def add(acc_DF, row, tile, mask):
      x_AD = jax.lax.dynamic_slice_in_dim(lhs_AD, row, tile)
      dy_AF = jax.lax.dynamic_slice_in_dim(d_out_AF, row, tile)
      if mask:  # `where` for both: 0 * nan is nan
        inside_A = (row + jnp.arange(tile) < start + size)[:, None]
        x_AD, dy_AF = (jnp.where(inside_A, x, 0) for x in (x_AD, dy_AF))
      return acc_DF + jax.lax.dot_general(
        x_AD,
        dy_AF,
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )

    zeros = jnp.zeros((lhs_AD.shape[1], d_out_AF.shape[1]), jnp.float32)
    return _walk(start, size, add, zeros).astype(dtype)

  stops_E = jnp.cumsum(group_sizes_E)
  return jax.lax.map(
    lambda x: one_group(*x), (stops_E - group_sizes_E, group_sizes_E)
  )


def unavailable() -> str | None:
  return None


def _gmm(x, rhs_EDF, group_sizes_E, contract):
  num_rows, dtype = x.shape[0], x.dtype
  x, rhs_EDF = _pad(x), rhs_EDF.astype(jnp.float32)
  stops_E = jnp.cumsum(group_sizes_E)
  # The groups that have rows, first; their weights only are read.
  order_E = jnp.argsort(group_sizes_E == 0, stable=True)

  def one_group(i, out):
    e = order_E[i]
    weight = jax.lax.dynamic_index_in_dim(rhs_EDF, e, keepdims=False)

    def write(out, row, tile, mask):
      del mask  # what overhangs is overwritten by the next group, or zeroed
      rows = jax.lax.dynamic_slice_in_dim(x, row, tile)
      y = jax.lax.dot_general(
        rows,
        weight,
        (((1,), (contract,)), ((), ())),
        preferred_element_type=jnp.float32,
      )
      return jax.lax.dynamic_update_slice_in_dim(out, y, row, 0)

    size = group_sizes_E[e]
    return _walk(stops_E[e] - size, size, write, out)

  out = jnp.zeros((x.shape[0], rhs_EDF.shape[2 - contract]), jnp.float32)
  out = jax.lax.fori_loop(0, (group_sizes_E > 0).sum(), one_group, out)[
    :num_rows
  ]
  used_A1 = jnp.arange(num_rows)[:, None] < stops_E[-1]
  return jnp.where(used_A1, out, 0).astype(dtype)


def _pad(x):
  """float32, with room for the last tile."""
  return jnp.pad(x.astype(jnp.float32), ((0, _TILES[-1]), (0, 0)))


def _walk(start, size, visit, carry):
  """`carry = visit(carry, row, tile, mask)` for the tiles of a group."""
  bulk = _TILES[-1]
  count = size // bulk
  carry = jax.lax.fori_loop(
    0, count, lambda i, c: visit(c, start + i * bulk, bulk, False), carry
  )
  rest = size - count * bulk
  row = start + count * bulk
  smaller = 0
  for tile in _TILES:
    # A loop of one turn or none: `lax.cond` would copy what is carried. The
    # row depends on the turn, or XLA would hoist the product out of the loop.
    turns = (smaller < rest) & (rest <= tile)
    carry = jax.lax.fori_loop(
      0,
      turns.astype(jnp.int32),
      lambda i, c, tile=tile: visit(c, row + i * tile, tile, True),
      carry,
    )
    smaller = tile
  return carry
