# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, and how its frequencies are stretched."""

import math

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
      "dynamic" with alpha); `yarn` divides slow pairs by `factor` and keeps
      fast ones, those that turn `beta_fast` times and more within `original`
      positions (Peng et al. 2023, arXiv:2309.00071).
  """
  if scaling.name == "ntk":
    theta *= scaling.kwargs["alpha"] ** (head_dim / (head_dim - 2))
  half = head_dim // 2
  frequencies_H = theta ** (-np.arange(half) / half)
  if scaling.name == "linear":
    frequencies_H /= scaling.kwargs["factor"]
  if scaling.name == "yarn":
    slow_H = _slowness(head_dim, theta, scaling.kwargs)
    stretched_H = frequencies_H / scaling.kwargs["factor"]
    frequencies_H = slow_H * stretched_H + (1 - slow_H) * frequencies_H
  return frequencies_H.astype(np.float32)


def _slowness(head_dim: int, theta: float, yarn: dict) -> np.ndarray:
  """How far each pair is stretched, from 0 (kept) to 1."""

  def pair(turns: float) -> float:
    """The pair that turns so many times within the original length."""
    length = yarn["original"] / (2 * math.pi * turns)
    return head_dim * math.log(length) / (2 * math.log(theta))

  low = max(math.floor(pair(yarn["beta_fast"])), 0)
  high = min(math.ceil(pair(yarn["beta_slow"])), head_dim - 1)
  pairs_H = np.arange(head_dim // 2)
  return np.clip((pairs_H - low) / max(high - low, 0.001), 0, 1)


def _magnitude(factor: float, weight: float) -> float:
  """Yarn's correction for sharper scores over a stretched length."""
  return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def angle_factor(scaling: Spec) -> float:
  """What cosines and sines are multiplied by: 1 but for some of yarn."""
  if scaling.name != "yarn":
    return 1.0
  yarn = scaling.kwargs
  above = _magnitude(yarn["factor"], yarn["mscale"])
  return above / _magnitude(yarn["factor"], yarn["mscale_all_dim"])


def score_factor(scaling: Spec) -> float:
  """What DeepSeek multiplies attention's scores by under yarn."""
  if scaling.name != "yarn":
    return 1.0
  yarn = scaling.kwargs
  return _magnitude(yarn["factor"], yarn["mscale_all_dim"]) ** 2


def rope_angles(
  positions_BT: Array, frequencies_H: np.ndarray, factor: float = 1.0
) -> tuple[Array, Array]:
  """Cosines and sines of RoPE's angles, float32 [B, T, head_dim / 2]."""

  def of_row(positions_T):
    angle_TH = positions_T[:, None].astype(jnp.float32) * frequencies_H[None]
    cos_TH, sin_TH = jnp.cos(angle_TH), jnp.sin(angle_TH)
    if factor == 1.0:
      return cos_TH, sin_TH
    return factor * cos_TH, factor * sin_TH

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
