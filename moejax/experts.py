# SPDX-License-Identifier: Apache-2.0
"""What an expert computes: pure functions over rows sorted by expert."""

import functools
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
  w_down_EFD = weights.w_down_EFD.astype(dtype)
  return _down(matmul, gate_AF, up_AF, scale_A, w_down_EFD, group_sizes_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _down(matmul, gate_AF, up_AF, scale_A, w_down_EFD, group_sizes_E):
  """From the first products to the last; what is between is not kept."""
  hidden_AF = _hidden(gate_AF, up_AF, scale_A)
  return matmul(hidden_AF, w_down_EFD, group_sizes_E, zero_beyond=False)


def _hidden(gate_AF, up_AF, scale_A):
  hidden_AF = jax.nn.silu(gate_AF) * up_AF
  return hidden_AF if scale_A is None else scale_rows(hidden_AF, scale_A)


def _forward(matmul, gate_AF, up_AF, scale_A, w_down_EFD, group_sizes_E):
  residuals = gate_AF, up_AF, scale_A, w_down_EFD, group_sizes_E
  return _down(matmul, *residuals), residuals


def _backward(matmul, residuals, dy_AD):
  gate_AF, up_AF, scale_A, w_down_EFD, group_sizes_E = residuals

  def product(h_AF, w_EFD):
    return matmul(h_AF, w_EFD, group_sizes_E, zero_beyond=False)

  # A product's gradient for its rows does not depend on them.
  _, pull = jax.vjp(lambda h_AF: product(h_AF, w_down_EFD), gate_AF)
  (d_hidden_AF,) = pull(dy_AD)
  # So the hidden channels and all their gradients come from one pass over
  # memory. Left alone, autodiff computes them in two, with parts kept between.
  gate_AF, up_AF, d_hidden_AF = jax.lax.optimization_barrier(
    (gate_AF, up_AF, d_hidden_AF)
  )
  hidden_AF, pull = jax.vjp(_hidden, gate_AF, up_AF, scale_A)
  d_gate_AF, d_up_AF, d_scale_A = pull(d_hidden_AF)
  _, pull = jax.vjp(lambda w_EFD: product(hidden_AF, w_EFD), w_down_EFD)
  (d_w_EFD,) = pull(dy_AD)
  return d_gate_AF, d_up_AF, d_scale_A, d_w_EFD, None


_down.defvjp(_forward, _backward)


def scale_rows(x_AD: Array, scale_A: Array) -> Array:
  """Each row times its float32 scale, in the rows' own type."""
  return (x_AD.astype(scale_A.dtype) * scale_A[:, None]).astype(x_AD.dtype)
