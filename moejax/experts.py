# SPDX-License-Identifier: Apache-2.0
"""What an expert computes: pure functions over rows sorted by expert."""

from collections.abc import Callable

import flax.struct
import jax

Array = jax.Array
GroupedMatmul = Callable[..., Array]


@flax.struct.dataclass
class GatedMlpWeights:
  """Stacked SwiGLU experts (Shazeer 2020)."""

  w_gate_EDF: Array
  w_up_EDF: Array
  w_down_EFD: Array


def gated_mlp(
  matmul: GroupedMatmul,
  h_AD: Array,
  group_sizes_E: Array,
  weights: GatedMlpWeights,
  scale_A: Array | None = None,
) -> Array:
  """`(silu(h W_gate) * (h W_up)) W_down`, each row by its own expert.

  Rows are scaled before the last product, which is linear: so its result is
  not needed for the gradient of the scale, nor computed again by remat.

  Args:
    matmul: `grouped_matmul` with a back end.
    h_AD: rows sorted by expert.
    group_sizes_E: rows of each expert.
    weights: the experts' weights, cast to the dtype of `h_AD` here.
    scale_A: what each row of the result is multiplied by; None for nothing.

  Returns:
    y_AD; rows beyond the last group hold anything.
  """
  dtype = h_AD.dtype
  gate_AF = matmul(h_AD, weights.w_gate_EDF.astype(dtype), group_sizes_E)
  up_AF = matmul(h_AD, weights.w_up_EDF.astype(dtype), group_sizes_E)
  hidden_AF = jax.nn.silu(gate_AF) * up_AF
  if scale_A is not None:
    hidden_AF = scale_rows(hidden_AF, scale_A)
  return matmul(
    hidden_AF, weights.w_down_EFD.astype(dtype), group_sizes_E,
    zero_beyond=False,
  )  # fmt: skip


def scale_rows(x_AD: Array, scale_A: Array) -> Array:
  """Each row times its float32 scale, in the rows' own type."""
  return (x_AD.astype(scale_A.dtype) * scale_A[:, None]).astype(x_AD.dtype)
