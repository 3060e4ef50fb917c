# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul: rows sorted by expert, each times its expert's weight.

One function, one VJP. A back end supplies three products: `gmm`,
`gmm_transposed` (for d_lhs) and `tgmm` (for d_rhs).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.ops.grouped_matmul import batched
from moejax.ops.grouped_matmul.backends import (
  choose_backend,
  describe,
  kernels_of,
)
from moejax.ops.residuals import PRODUCTS, checkpoint_name

__all__ = ["grouped_matmul", "choose_backend", "describe"]

_DTYPES = (jnp.float32, jnp.bfloat16)


def grouped_matmul(
  lhs_AD, rhs_EDF, group_sizes_E, *, backend: str, zero_beyond: bool = True
):
  """Multiplies each group of rows by its own matrix.

  Args:
    lhs_AD: rows sorted by group: the first `group_sizes_E[0]` belong to group
      0, and so on. Rows beyond the last group may hold anything, NaN included.
    rhs_EDF: a matrix per group.
    group_sizes_E: integers; zeros are fine; their sum is at most A. As NumPy's
      and all the same, they make one batched product on a TPU or GPU.
    backend: a name from `choose_backend`.
    zero_beyond: False where the caller looks at no row beyond the last group,
      which saves a pass over the result on a TPU.

  Returns:
    `out_AF` in lhs's type, accumulated in float32. Rows beyond the last group
    are exactly zero (or may be anything) and have zero gradients.
  """
  _check(lhs_AD, rhs_EDF, group_sizes_E)
  if batched.fits(backend, lhs_AD.shape[0], group_sizes_E):
    backend = "batched"
  if 0 in (*lhs_AD.shape, *rhs_EDF.shape):
    return jnp.zeros((lhs_AD.shape[0], rhs_EDF.shape[2]), lhs_AD.dtype)
  out_AF = _grouped_matmul(
    lhs_AD, rhs_EDF, jnp.asarray(group_sizes_E, jnp.int32), backend,
    zero_beyond,
  )  # fmt: skip
  return checkpoint_name(out_AF, PRODUCTS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_matmul(lhs_AD, rhs_EDF, group_sizes_E, name, zero_beyond):
  kernels = kernels_of(name)
  if not zero_beyond and hasattr(kernels, "gmm_unzeroed"):
    return kernels.gmm_unzeroed(lhs_AD, rhs_EDF, group_sizes_E)
  return kernels.gmm(lhs_AD, rhs_EDF, group_sizes_E)


def _forward(lhs_AD, rhs_EDF, group_sizes_E, name, zero_beyond):
  out_AF = _grouped_matmul(lhs_AD, rhs_EDF, group_sizes_E, name, zero_beyond)
  return out_AF, (lhs_AD, rhs_EDF, group_sizes_E)


def _backward(name, zero_beyond, residuals, d_out_AF):
  del zero_beyond  # gradients beyond are zero in any case
  lhs_AD, rhs_EDF, group_sizes_E = residuals
  kernels = kernels_of(name)
  d_lhs_AD = kernels.gmm_transposed(d_out_AF, rhs_EDF, group_sizes_E)
  d_rhs_EDF = kernels.tgmm(lhs_AD, d_out_AF, group_sizes_E, rhs_EDF.dtype)
  d_sizes_E = np.zeros(group_sizes_E.shape, jax.dtypes.float0)
  return d_lhs_AD.astype(lhs_AD.dtype), d_rhs_EDF, d_sizes_E


_grouped_matmul.defvjp(_forward, _backward)


def _check(lhs_AD, rhs_EDF, group_sizes_E) -> None:
  shapes = lhs_AD.shape, rhs_EDF.shape, group_sizes_E.shape
  said = "grouped_matmul: lhs {}, rhs {}, group_sizes {}: ".format(*shapes)
  if tuple(map(len, shapes)) != (2, 3, 1):
    raise ValueError(said + "expected [A, D], [E, D, F] and [E]")
  if lhs_AD.shape[1] != rhs_EDF.shape[1]:
    raise ValueError(
      f"{said}lhs has D={lhs_AD.shape[1]} but rhs has D={rhs_EDF.shape[1]}"
    )
  if rhs_EDF.shape[0] != group_sizes_E.shape[0]:
    raise ValueError(
      f"{said}rhs has E={rhs_EDF.shape[0]} groups but there are "
      f"{group_sizes_E.shape[0]} sizes"
    )
  for name, x in ("lhs", lhs_AD), ("rhs", rhs_EDF):
    if x.dtype not in _DTYPES:
      raise ValueError(
        f"grouped_matmul: {name} is {x.dtype}; use float32 or bfloat16"
      )
  if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
    raise ValueError(
      f"grouped_matmul: group_sizes are {group_sizes_E.dtype}, not integers"
    )
