# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, and how its frequencies are stretched."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.spec import Spec

Array = jax.Array


def rope_frequencies(head_dim: int, theta: float, scaling: Spec) -> np.ndarray:
  """Radians a position of each pair of channels, float32 [head_dim / 2].

  Args:
    head_dim: channels that are rotated.
    theta: base; pair i turns by `theta ** (-2 i / head_dim)` a position.
    scaling: `none`; `linear(factor)` divides positions; `ntk(alpha)` raises the
      base to `theta * alpha ** (d / (d - 2))` at every length (Hunyuan-Large's
      "dynamic" with alpha).
  """
  if scaling.name == "ntk":
    theta *= scaling.kwargs["alpha"] ** (head_dim / (head_dim - 2))
  half = head_dim // 2
  frequencies_H = theta ** (-np.arange(half) / half)
  if scaling.name == "linear":
    frequencies_H /= scaling.kwargs["factor"]
  return frequencies_H.astype(np.float32)


def rope_angles(
  positions_BT: Array, frequencies_H: np.ndarray
) -> tuple[Array, Array]:
  """Cosines and sines of RoPE's angles, float32 [B, T, head_dim / 2]."""

  def of_row(positions_T):
    angle_TH = positions_T[:, None].astype(jnp.float32) * frequencies_H[None]
    return jnp.cos(angle_TH), jnp.sin(angle_TH)

  # A loop, since XLA:CPU fuses bare cosines into each layer's rotation, where
  # it takes them anew for each head (and drops optimization barriers first).
  return jax.lax.map(of_row, positions_BT)


def rope(x_BTNH: Array, cos_BTH: Array, sin_BTH: Array) -> Array:
  """Rotary embedding, half-split form (Su et al. 2021), in float32."""
  cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTNH.dtype)
