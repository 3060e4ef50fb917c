# SPDX-License-Identifier: Apache-2.0
"""The MoE layer: router decides, dispatch moves, experts compute."""

import functools
from collections.abc import Callable
from typing import Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.errors import ConfigError
from moejax.experts import GatedMlpWeights, gated_mlp
from moejax.models.backends import Backends
from moejax.models.layers import Mlp, weight
from moejax.models.placement import STREAM, TOKENS, Axes, Partial
from moejax.models.rows import Rows
from moejax.models.watching import choices_if_watched, record
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.routing import (
  RouterStats,
  Routing,
  balance,
  is_causal,
  resolve,
)
from moejax.routing.calling import call_router
from moejax.routing.inputs import BIAS, asks_for, option, projections_of
from moejax.routing.probe import probe

Array = jax.Array


EXPERT_IN, EXPERT_OUT = (
  Axes("expert", "embed", "mlp"),
  Axes("expert", "mlp_rows", None),
)


class MoE(nn.Module):
  """Routed experts, plus shared ones that every token visits."""

  config: ModelConfig
  backends: Backends

  @nn.compact
  def __call__(
    self, x_BTD: Array, rows: Rows, layer: Array
  ) -> tuple[Array, RouterStats]:
    """Output [B, T, D] and the routing's sums; no expert sees padding rows.

    `layer` is the layer's index, which sets its routing noise apart.
    """
    cfg, backends = self.config, self.backends
    expert_fn = functools.partial(
      gated_mlp, functools.partial(grouped_matmul, backend=backends.matmul)
    )

    def local(x_BTD, tokens, router, weights):
      B, T, D = x_BTD.shape
      routing, stats = route(cfg, backends, x_BTD, tokens, router)
      y_TD = backends.dispatch(
        expert_fn, weights, x_BTD.reshape(B * T, D), routing
      )
      choices = choices_if_watched(self, routing, tokens.mask_BT)
      return y_TD.reshape(B, T, D), stats, choices

    # Each device has a part of each expert's hidden channels.
    out_axes = Partial(STREAM, over=("mlp",)), STATS, TOKENS
    weights_axes = GatedMlpWeights(EXPERT_IN, EXPERT_IN, EXPERT_OUT)
    y_BTD, stats, choices = backends.placement.local(
      local, (STREAM, TOKENS, ROUTER, weights_axes), out_axes
    )(
      x_BTD, RoutedTokens.of(cfg, rows, layer), router_weights(self, cfg),
      jax.tree.map(lambda w: w.astype(x_BTD.dtype), self._weights()),
    )  # fmt: skip
    record(self, x_BTD, choices)
    y_BTD = add_bias(self, cfg, y_BTD)
    shared = cfg.moe.num_shared_experts
    if shared:
      y_BTD += Mlp(cfg, shared * cfg.moe.d_expert, name="shared")(x_BTD)
    return y_BTD, stats

  def _weights(self) -> GatedMlpWeights:
    cfg = self.config
    D, E, F = cfg.d_model, cfg.moe.num_experts, cfg.moe.d_expert
    return GatedMlpWeights(
      w_gate_EDF=weight(self, "w_gate_EDF", (E, D, F), EXPERT_IN, cfg),
      w_up_EDF=weight(self, "w_up_EDF", (E, D, F), EXPERT_IN, cfg),
      w_down_EFD=weight(self, "w_down_EFD", (E, F, D), EXPERT_OUT, cfg),
    )


@flax.struct.dataclass
class RouterWeights:
  """What a layer's router decides by.

  Attributes:
    w_DE: of its logits.
    bias_E: its state, if it has one.
    further: a matrix for each of its further logits, by its parameter's name.
  """

  w_DE: Array
  bias_E: Array | None
  further: dict[str, Array]


@flax.struct.dataclass
class RoutedTokens:
  """What a router knows of tokens beside their logits, [B, T] each.

  Attributes:
    mask_BT: False for padding.
    keys_BT: a random key each; None where nothing is random.
    asked: what else the router asks for, by its parameter's name.
  """

  mask_BT: Array
  keys_BT: Array | None
  asked: dict[str, Array]

  @classmethod
  def of(cls, config: ModelConfig, rows: Rows, layer: Array) -> Self:
    router = resolve(config.moe.router_spec)
    known = {"token_T": rows.tokens_BT, "position_T": rows.positions_BT}
    asked = {name: x for name, x in known.items() if asks_for(router, name)}
    return cls(rows.segment_ids_BT > 0, rows.token_keys(layer), asked)


ROUTER = RouterWeights(Axes("embed", None), Axes(None), Axes("embed", None))
STATS = Partial(Axes("batch"), over=("tokens",))


def router_weights(module: nn.Module, config: ModelConfig) -> RouterWeights:
  """The parameters and the state of a layer's own router."""
  D, E = config.d_model, config.moe.num_experts
  w_DE = weight(module, "w_router_DE", (D, E), ROUTER.w_DE, config)
  router = resolve(config.moe.router_spec)
  further = {
    name: _Projection(config, width, name=f"router_{name.rpartition('_')[0]}")()
    for name, width in projections_of(router, E).items()
  }
  if not balance.has_bias(router):
    return RouterWeights(w_DE, None, further)
  zeros = lambda: jnp.zeros(E, jnp.float32)
  bias = module.variable("router_state", balance.NAME, zeros)
  return RouterWeights(w_DE, bias.value, further)


class _Projection(nn.Module):
  """One more matrix of a router.

  A module of its own, so that all other weights start as they would without it.
  """

  config: ModelConfig
  width: int

  @nn.compact
  def __call__(self) -> Array:
    shape = self.config.d_model, self.width
    return weight(self, "w_DE", shape, ROUTER.w_DE, self.config)


def route(
  config: ModelConfig,
  backends: Backends,
  x_BTD: Array,
  tokens: RoutedTokens,
  weights: RouterWeights,
) -> tuple[Routing, RouterStats]:
  """The routing of the flattened tokens, and its sums of each row."""
  router, name = resolve(config.moe.router_spec), config.moe.router
  probe(router, config.moe.num_experts, name)
  _check_rows(config, router, tokens)
  x_TD = x_BTD.reshape(-1, config.d_model).astype(jnp.float32)
  # float32 at full precision: rounded logits flip near-ties.
  project = lambda w_DE: jnp.matmul(
    x_TD, w_DE, precision=jax.lax.Precision.HIGHEST
  )
  asked = {name: x.reshape(-1) for name, x in tokens.asked.items()}
  asked |= {name: project(w) for name, w in weights.further.items()}
  if weights.bias_E is not None:
    asked[BIAS] = weights.bias_E
  keys = None if tokens.keys_BT is None else tokens.keys_BT.reshape(-1)
  logits_TE = project(weights.w_DE)
  mask_T = tokens.mask_BT.reshape(-1)
  routing = call_router(router, name, logits_TE, mask_T, keys, asked)
  _check_experts_per_token(config, routing)
  if config.moe.dispatch == "padded" and keys is not None:
    _check_capacity(config, routing)
  routing = backends.placement.admit(routing)
  return routing, RouterStats.of(routing, tokens.mask_BT)


def _check_rows(
  config: ModelConfig, router: Callable[..., Routing], tokens: RoutedTokens
) -> None:
  """Groups across two rows would depend on how a batch is split."""
  if not asks_for(router, "group_size"):
    return
  if tokens.keys_BT is None and is_causal(router):
    return  # in evaluation it has none
  T, size = tokens.mask_BT.shape[1], option(router, "group_size")
  if T % size:
    raise ConfigError(
      f"model.moe.router={config.moe.router!r}: rows, or their parts on a "
      f"device, of {T} tokens are not groups of {size}; use a group_size that "
      f"divides {T}"
    )


def _check_capacity(config: ModelConfig, routing: Routing) -> None:
  if not routing.capacity:
    raise ConfigError(
      f"model.moe.dispatch=padded needs a router with a capacity (switch, "
      f"recycle, expert_choice); {config.moe.router!r} has none: use ragged"
    )


def _check_experts_per_token(config: ModelConfig, routing: Routing) -> None:
  X, k = routing.experts_per_token, config.moe.experts_per_token
  if X and X != k:
    raise ConfigError(
      f"model.moe.router={config.moe.router!r} gives each token {X} experts, "
      f"its name says k={k}, which counts parameters and FLOPs; give the "
      f"router an option k and write k={X}"
    )


def add_bias(module: nn.Module, config: ModelConfig, y_BTD: Array) -> Array:
  """One bias after the sum over experts, ungated (JetMoE), if it is wanted."""
  if not config.moe.output_bias:
    return y_BTD
  init = nn.with_logical_partitioning(nn.initializers.zeros, ("norm",))
  bias_D = module.param("bias_D", init, (config.d_model,))
  return y_BTD + bias_D[None, None].astype(y_BTD.dtype)
