# SPDX-License-Identifier: Apache-2.0
"""Parts that every layer uses: weights, norms, the dense MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig

Array = jax.Array


def weight(
  module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...],
  config: ModelConfig,
) -> Array:  # fmt: skip
  """A float32 parameter, drawn as the config says.

  `axes` are logical names; `parallel` maps them to a mesh.
  """
  std, cut = config.init_std, config.init_cut
  init = (
    nn.initializers.truncated_normal(std, jnp.float32, -cut, cut)
    if cut
    else nn.initializers.normal(std, jnp.float32)
  )
  return module.param(
    name, nn.with_logical_partitioning(init, tuple(axes)), shape
  )


def scale(module: nn.Module, name: str, size: int, axis: str) -> Array:
  """A float32 gain that starts at 1."""
  init = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
  return module.param(name, init, (size,))


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
  """RMSNorm (Zhang & Sennrich 2019) over the last axis, sums in float32."""
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
  gain = jnp.expand_dims(gain.astype(x.dtype), tuple(range(x.ndim - 1)))
  return (x32 * inverse).astype(x.dtype) * gain


def layer_norm(x: Array, gain: Array, eps: float) -> Array:
  """LayerNorm (Ba et al. 2016) over the last axis without a bias (DBRX)."""
  x32 = x.astype(jnp.float32)
  x32 -= x32.mean(axis=-1, keepdims=True)
  return rms_norm(x32, gain, eps).astype(x.dtype)


class Norm(nn.Module):
  """The config's norm of the residual stream."""

  kind: str
  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    function = {"rms": rms_norm, "layer": layer_norm}[self.kind]
    return function(x, scale(self, "scale", x.shape[-1], "norm"), self.eps)


class Mlp(nn.Module):
  """Dense SwiGLU (Shazeer 2020) of hidden width `d_hidden`."""

  config: ModelConfig
  d_hidden: int

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    cfg = self.config
    D, F = cfg.d_model, self.d_hidden
    dtype = x_BTD.dtype
    w_gate_DF = weight(self, "w_gate_DF", (D, F), ("embed", "mlp"), cfg)
    w_up_DF = weight(self, "w_up_DF", (D, F), ("embed", "mlp"), cfg)
    w_down_FD = weight(self, "w_down_FD", (F, D), ("mlp", "embed"), cfg)
    gate_BTF = x_BTD @ w_gate_DF.astype(dtype)
    up_BTF = x_BTD @ w_up_DF.astype(dtype)
    return (jax.nn.silu(gate_BTF) * up_BTF) @ w_down_FD.astype(dtype)
