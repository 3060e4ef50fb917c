# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul written to be obviously right: every expert for every row.

E times the arithmetic, float32 inside, any platform. For tests and debugging.
"""

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def gmm(lhs_AD, rhs_EDF, group_sizes_E):
  return _sum_over_experts("AD,EDF->EAF", lhs_AD, rhs_EDF, group_sizes_E)


def gmm_transposed(d_out_AF, rhs_EDF, group_sizes_E):
  return _sum_over_experts("AF,EDF->EAD", d_out_AF, rhs_EDF, group_sizes_E)


def tgmm(lhs_AD, d_out_AF, group_sizes_E, dtype):
  member_EA = _member(lhs_AD.shape[0], group_sizes_E)[:, :, None]
  # `where`, not a product with the mask: 0 * nan is nan.
  lhs_EAD = jnp.where(member_EA, lhs_AD.astype(jnp.float32), 0)
  d_out_EAF = jnp.where(member_EA, d_out_AF.astype(jnp.float32), 0)
  out_EDF = jnp.einsum("EAD,EAF->EDF", lhs_EAD, d_out_EAF, precision=_HIGHEST)
  return out_EDF.astype(dtype)


def unavailable() -> str | None:
  return None


def _member(num_rows, group_sizes_E):
  """`[E, A]`: whether row `a` belongs to group `e`."""
  stop_E = jnp.cumsum(group_sizes_E)
  start_E = stop_E - group_sizes_E
  row_1A = jnp.arange(num_rows)[None]
  return (row_1A >= start_E[:, None]) & (row_1A < stop_E[:, None])


def _sum_over_experts(equation, x, rhs_EDF, group_sizes_E):
  out = jnp.einsum(
    equation,
    x.astype(jnp.float32),
    rhs_EDF.astype(jnp.float32),
    precision=_HIGHEST,
  )
  member_EA = _member(x.shape[0], group_sizes_E)[:, :, None]
  return jnp.where(member_EA, out, 0).sum(0).astype(x.dtype)
