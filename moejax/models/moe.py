# SPDX-License-Identifier: Apache-2.0
"""The MoE layer: router decides, dispatch moves, experts compute."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.experts import GatedMlpWeights, gated_mlp
from moejax.models.layers import Mlp, weight
from moejax.models.rows import Rows
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.routing import RouterStats, check_routing, resolve

Array = jax.Array
Dispatch = Callable[..., Array]


class MoE(nn.Module):
  """Routed experts, plus shared ones that every token visits."""

  config: ModelConfig
  dispatch: Dispatch
  matmul: str

  @nn.compact
  def __call__(
    self, x_BTD: Array, rows: Rows, layer: Array
  ) -> tuple[Array, RouterStats]:
    """Output [B, T, D] and the routing's sums; no expert sees padding rows.

    `layer` is the layer's index, which sets its routing noise apart.
    """
    B, T, D = x_BTD.shape
    mask_BT = rows.segment_ids_BT > 0
    x_TD = x_BTD.reshape(B * T, D)
    router = resolve(self.config.moe.router_spec)
    routing = check_routing(
      router(
        self._logits(x_TD), mask_BT.reshape(-1), rng=rows.token_keys(layer)
      ),
      self.config.moe.router,
    )
    expert_fn = functools.partial(
      gated_mlp, functools.partial(grouped_matmul, backend=self.matmul)
    )
    y_TD = self.dispatch(expert_fn, self._weights(), x_TD, routing)
    y_BTD = y_TD.reshape(B, T, D)
    shared = self.config.moe.num_shared_experts
    if shared:
      width = shared * self.config.moe.d_expert
      y_BTD += Mlp(self.config, width, name="shared")(x_BTD)
    return y_BTD, RouterStats.of(routing, mask_BT)

  def _logits(self, x_TD: Array) -> Array:
    D, E = self.config.d_model, self.config.moe.num_experts
    w_DE = weight(
      self, "w_router_DE", (D, E), ("embed", "router"), self.config.init_std
    )
    # float32 at full precision: rounded logits flip near-ties.
    return jnp.matmul(
      x_TD.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST
    )

  def _weights(self) -> GatedMlpWeights:
    cfg, std = self.config, self.config.init_std
    D, E, F = cfg.d_model, cfg.moe.num_experts, cfg.moe.d_expert
    inward, outward = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    return GatedMlpWeights(
      w_gate_EDF=weight(self, "w_gate_EDF", (E, D, F), inward, std),
      w_up_EDF=weight(self, "w_up_EDF", (E, D, F), inward, std),
      w_down_EFD=weight(self, "w_down_EFD", (E, F, D), outward, std),
    )
