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
from moejax.routing import (
  RouterStats,
  Routing,
  balance,
  check_routing,
  resolve,
)

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
    cfg = self.config
    B, T, D = x_BTD.shape
    routing, stats = route(self, cfg, x_BTD, rows, layer)
    expert_fn = functools.partial(
      gated_mlp, functools.partial(grouped_matmul, backend=self.matmul)
    )
    y_TD = self.dispatch(
      expert_fn, self._weights(), x_BTD.reshape(B * T, D), routing
    )
    y_BTD = add_bias(self, cfg, y_TD.reshape(B, T, D))
    shared = cfg.moe.num_shared_experts
    if shared:
      y_BTD += Mlp(cfg, shared * cfg.moe.d_expert, name="shared")(x_BTD)
    return y_BTD, stats

  def _weights(self) -> GatedMlpWeights:
    cfg, std = self.config, self.config.init_std
    D, E, F = cfg.d_model, cfg.moe.num_experts, cfg.moe.d_expert
    inward, outward = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    return GatedMlpWeights(
      w_gate_EDF=weight(self, "w_gate_EDF", (E, D, F), inward, std),
      w_up_EDF=weight(self, "w_up_EDF", (E, D, F), inward, std),
      w_down_EFD=weight(self, "w_down_EFD", (E, F, D), outward, std),
    )


def route(
  module: nn.Module, config: ModelConfig, x_BTD: Array, rows: Rows, layer: Array
) -> tuple[Routing, RouterStats]:
  """The routing of a layer by a router of its own, and its sums."""
  D, E = config.d_model, config.moe.num_experts
  w_DE = weight(
    module, "w_router_DE", (D, E), ("embed", "router"), config.init_std
  )
  # float32 at full precision: rounded logits flip near-ties.
  logits_TE = jnp.matmul(
    x_BTD.reshape(-1, D).astype(jnp.float32), w_DE,
    precision=jax.lax.Precision.HIGHEST,
  )  # fmt: skip
  mask_BT = rows.segment_ids_BT > 0
  router = resolve(config.moe.router_spec)
  state = {}
  if balance.has_bias(router):
    zeros = lambda: jnp.zeros(E, jnp.float32)
    state["bias_E"] = module.variable("router_state", balance.NAME, zeros).value
  keys = rows.token_keys(layer)
  routing = check_routing(
    router(logits_TE, mask_BT.reshape(-1), rng=keys, **state),
    config.moe.router,
  )
  return routing, RouterStats.of(routing, mask_BT)


def add_bias(module: nn.Module, config: ModelConfig, y_BTD: Array) -> Array:
  """One bias after the sum over experts, ungated (JetMoE), if it is wanted."""
  if not config.moe.output_bias:
    return y_BTD
  init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
  bias_D = module.param("bias_D", init, (config.d_model,))
  return y_BTD + bias_D[None, None].astype(y_BTD.dtype)
