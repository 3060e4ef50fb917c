# SPDX-License-Identifier: Apache-2.0
"""Groups of one size, known when the program is traced: a batched product.

Taken in place of a TPU's or GPU's kernels whenever the sizes say so; no config
names it. On a CPU, a BLAS product per group is no slower than XLA's.
"""

import jax.numpy as jnp
import numpy as np


def fits(backend: str, num_rows: int, group_sizes_E) -> bool:
  """Whether the sizes are NumPy's, all the same, and leave no row over."""
  return (
    backend in ("tpu", "gpu")
    and isinstance(group_sizes_E, np.ndarray)
    and len(set(group_sizes_E.tolist())) == 1
    and int(group_sizes_E.sum()) == num_rows
  )


def gmm(lhs_AD, rhs_EDF, group_sizes_E):
  return _product("ECD,EDF->ECF", lhs_AD, rhs_EDF)


def gmm_transposed(d_out_AF, rhs_EDF, group_sizes_E):
  return _product("ECF,EDF->ECD", d_out_AF, rhs_EDF)


def tgmm(lhs_AD, d_out_AF, group_sizes_E, dtype):
  E = group_sizes_E.shape[0]
  folded = (x.reshape(E, -1, x.shape[1]) for x in (lhs_AD, d_out_AF))
  out_EDF = jnp.einsum(
    "ECD,ECF->EDF", *folded, preferred_element_type=jnp.float32
  )
  return out_EDF.astype(dtype)


def _product(equation, rows, rhs_EDF):
  E = rhs_EDF.shape[0]
  out = jnp.einsum(
    equation, rows.reshape(E, -1, rows.shape[1]), rhs_EDF,
    preferred_element_type=jnp.float32,
  )  # fmt: skip
  return out.reshape(rows.shape[0], -1).astype(rows.dtype)
