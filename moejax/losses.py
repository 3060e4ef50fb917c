# SPDX-License-Identifier: Apache-2.0
"""All terms of the loss, from sums: the same on any split of the batch.

Sums come from the forward pass (cross entropy over tokens, `RouterStats` over
layers and rows); every mean is taken here, once, over its scope.
"""

import dataclasses
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from moejax.config import LossConfig
from moejax.routing import RouterStats

Array = jax.Array


@flax.struct.dataclass
class LossWeights:
  """Weights of the loss's terms, as in the config: numbers, or arrays of one.

  A number that is 0 leaves its term out of the program.
  """

  z_loss: float | Array
  load_balance: float | Array
  sequence_balance: float | Array
  mutual_information: float | Array
  router_entropy: float | Array
  router_z: float | Array

  @classmethod
  def of(cls, config: LossConfig) -> Self:
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(config, name) for name in names})


@flax.struct.dataclass
class LossSums:
  """Sums over target tokens; `total` carries the gradient.

  Attributes:
    total: sum of xent + z_weight * z.
    xent: sum of next-token cross entropies, in nats.
    z: sum of squared logsumexp of the logits.
    tokens: number of targets.
    xent_U, tokens_U: both by source of the row; None where not asked for.
  """

  total: Array
  xent: Array
  z: Array
  tokens: Array
  xent_U: Array | None = None
  tokens_U: Array | None = None


def next_token_sums(
  hidden_TD: Array,
  table_VD: Array,
  targets_T: Array,
  mask_T: Array,
  z_weight: float | Array,
  chunk_size: int,
  source_T: Array | None = None,
  num_sources: int = 0,
) -> LossSums:
  """Cross entropy (and z-loss) sums, `chunk_size` tokens at a time.

  The float32 logits [T, V] never exist at once: each chunk's logits give its
  loss and, when differentiated, its gradients right away, so the backward pass
  recomputes nothing.

  Args:
    hidden_TD: final hidden states.
    table_VD: output embedding, float32; cast to the dtype of `hidden_TD`.
    targets_T: int32 next tokens.
    mask_T: bool; False targets count nowhere.
    z_weight: weight of the squared logsumexp (PaLM, Chowdhery et al. 2022).
    chunk_size: tokens per chunk; the last chunk is padded with masked tokens.
    source_T: int32, the source of each token's row.
    num_sources: sums are told apart by so many; 0 does not.
  """
  T, D = hidden_TD.shape
  chunk = min(chunk_size, T)
  pad = -T % chunk
  fold = lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(
    (T + pad) // chunk, chunk, *x.shape[1:]
  )
  of_source_TU = jnp.zeros((T, 0), bool)
  if num_sources:
    of_source_TU = source_T[:, None] == jnp.arange(num_sources)[None]
    of_source_TU &= mask_T[:, None]
  xent, z, xent_U = _xent_sums(
    z_weight, fold(hidden_TD), table_VD, fold(targets_T), fold(mask_T),
    fold(of_source_TU),
  )  # fmt: skip
  tokens = mask_T.sum(dtype=jnp.float32)
  # `xent` already carries the gradient of the z term: see _xent_fwd.
  total = xent + z_weight * jax.lax.stop_gradient(z)
  sums = LossSums(total, jax.lax.stop_gradient(xent), z, tokens)
  if not num_sources:
    return sums
  tokens_U = of_source_TU.sum(0, dtype=jnp.float32)
  return sums.replace(xent_U=jax.lax.stop_gradient(xent_U), tokens_U=tokens_U)


@jax.custom_vjp
def _xent_sums(z_weight, hidden_CTD, table_VD, targets_CT, mask_CT, of_CTU):
  """(xent, z, xent by source); xent's gradient is that of xent + z_weight z."""
  table = table_VD.astype(hidden_CTD.dtype)

  def chunk(sums, inputs):
    more, _ = _chunk_sums(table, *inputs)
    return jax.tree.map(jnp.add, sums, more), None

  chunks = (hidden_CTD, targets_CT, mask_CT, of_CTU)
  return jax.lax.scan(chunk, _zero_sums(of_CTU), chunks)[0]


def _zero_sums(of_CTU):
  zero = jnp.zeros((), jnp.float32)
  return zero, zero, jnp.zeros(of_CTU.shape[-1], jnp.float32)


def _chunk_sums(table_VD, hidden_TD, targets_T, mask_T, of_TU):
  """Sums of one chunk, and what its gradient needs."""
  logits_TV = jnp.einsum(
    "td,vd->tv", hidden_TD, table_VD, preferred_element_type=jnp.float32
  )
  lse_T = jax.nn.logsumexp(logits_TV, axis=-1)
  target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
  xent_T = jnp.where(mask_T, lse_T - target_T, 0.0)
  z = jnp.where(mask_T, lse_T**2, 0.0).sum()
  # No product with zero: what is not finite is of one source.
  xent_U = jnp.where(of_TU, xent_T[:, None], 0.0).sum(0)
  return (xent_T.sum(), z, xent_U), (logits_TV, lse_T)


def _xent_fwd(z_weight, hidden_CTD, table_VD, targets_CT, mask_CT, of_CTU):
  dtype = hidden_CTD.dtype
  table = table_VD.astype(dtype)
  V = table_VD.shape[0]

  def chunk(carry, inputs):
    sums, d_table_VD = carry
    hidden_TD, targets_T, mask_T, _ = inputs
    more, (logits_TV, lse_T) = _chunk_sums(table, *inputs)
    prob_TV = jnp.exp(logits_TV - lse_T[:, None])
    # d(xent + w z) / d logits = p - onehot + 2 w lse p, for counted tokens.
    factor_T = jnp.where(mask_T, 1.0 + 2.0 * z_weight * lse_T, 0.0)
    onehot_TV = targets_T[:, None] == jnp.arange(V)[None]
    counted_T = mask_T.astype(jnp.float32)
    d_logits_TV = (
      prob_TV * factor_T[:, None] - onehot_TV * counted_T[:, None]
    ).astype(dtype)
    d_hidden_TD = d_logits_TV @ table
    d_table_VD += jnp.einsum(
      "tv,td->vd", d_logits_TV, hidden_TD, preferred_element_type=jnp.float32
    )
    return (jax.tree.map(jnp.add, sums, more), d_table_VD), d_hidden_TD

  init = (_zero_sums(of_CTU), jnp.zeros(table_VD.shape, jnp.float32))
  (sums, d_table_VD), d_hidden_CTD = jax.lax.scan(
    chunk, init, (hidden_CTD, targets_CT, mask_CT, of_CTU)
  )
  return sums, (d_hidden_CTD, d_table_VD.astype(table_VD.dtype))


def _xent_bwd(residuals, cotangents):
  d_hidden_CTD, d_table_VD = residuals
  g = cotangents[0]
  return (
    None,  # the weight is in the residuals, and learns nothing
    (g * d_hidden_CTD).astype(d_hidden_CTD.dtype),
    g * d_table_VD,
    None,
    None,
    None,
  )


_xent_sums.defvjp(_xent_fwd, _xent_bwd)


def load_balance(stats: RouterStats, scope: str) -> Array:
  """Load-balancing loss; 1 at perfect balance, E if one expert takes all.

  Per layer E * sum_e f_e P_e, with f the share of assignments (as the router
  chose, before any capacity; by its scores alone, where a bias chooses) and P
  the mean probability of expert e, then the mean over layers: the form of
  Switch (Fedus et al. 2021, arXiv:2101.03961) that OLMoE and DBRX train with.
  Gradient flows through P.

  Args:
    stats: sums stacked [L, B, ...].
    scope: "global" takes f and P over all rows; "sequence" per row, then the
      mean over rows weighted by their tokens: DeepSeek-V3's complementary loss
      (arXiv:2412.19437, equations 17 to 20), where its factor E / (k T) makes
      f sum to E, as here; 1 at balance too.
  """
  count_LBE, prob_LBE = stats.wanted_BE, stats.prob_BE
  tokens_LB = stats.tokens_B
  if scope == "global":
    sum_rows = lambda x: x.sum(1, keepdims=True)
    count_LBE, prob_LBE, tokens_LB = map(
      sum_rows, (count_LBE, prob_LBE, tokens_LB)
    )
  share_LBE = count_LBE / _at_least_one(count_LBE.sum(-1, keepdims=True))
  mean_LBE = prob_LBE / _at_least_one(tokens_LB[..., None])
  E = count_LBE.shape[-1]
  loss_LB = E * (jax.lax.stop_gradient(share_LBE) * mean_LBE).sum(-1)
  weight_LB = tokens_LB / _at_least_one(tokens_LB.sum(1, keepdims=True))
  return (loss_LB * weight_LB).sum(1).mean()


def router_z(stats: RouterStats) -> Array:
  """Router z-loss, mean over tokens and layers of logsumexp(logits)^2.

  Zoph et al. 2022 (ST-MoE); (ln E)^2 at zero logits.
  """
  return (stats.z_B.sum(1) / _at_least_one(stats.tokens_B.sum(1))).mean()


def mutual_information(stats: RouterStats) -> Array:
  """Minus the mutual information of tokens and experts, in nats.

  Per layer `sum_e P_e ln P_e + mean_t H(p_t)`, with P the mean of the tokens'
  probabilities p_t and H the entropy, then the mean over layers: -ln E where
  loads are even and each token is sure of its expert, 0 where all tokens have
  the same probabilities, which even ones are too (ModuleFormer, Shen et al.
  2023, arXiv:2306.04640). Gradient flows through both terms.

  Args:
    stats: sums stacked [L, B, ...], taken over all rows.
  """
  tokens_L1 = _at_least_one(stats.tokens_B.sum(1))[:, None]
  mean_LE = stats.prob_BE.sum(1) / tokens_L1
  tiny = jnp.finfo(jnp.float32).tiny
  negative_L = (mean_LE * jnp.log(jnp.maximum(mean_LE, tiny))).sum(-1)
  return negative_L.mean() + router_entropy(stats)


def router_entropy(stats: RouterStats) -> Array:
  """Mean entropy of the tokens' probabilities, in nats; ln E if all are even.

  Keeps `top_p` from needing ever more experts (Huang et al. 2024,
  arXiv:2403.07652, its dynamic loss).
  """
  tokens_L = _at_least_one(stats.tokens_B.sum(1))
  return (stats.entropy_B.sum(1) / tokens_L).mean()


def total_loss(
  config: LossConfig,
  sums: LossSums,
  stats: RouterStats | None,
  weights: LossWeights | None = None,
) -> tuple[Array, dict[str, Array]]:
  """The scalar to differentiate and its terms by metric name.

  Router terms are logged as means and unweighted, so that they read the same at
  any weight and depth.

  Args:
    config: what the terms are.
    sums, stats: of the batch.
    weights: of the terms; None takes the config's.
  """
  weights = LossWeights.of(config) if weights is None else weights
  tokens = _at_least_one(sums.tokens)
  loss = sums.total / tokens
  terms = {"loss/xent": sums.xent / tokens, "loss/z": sums.z / tokens}
  if stats is not None:
    balance = load_balance(stats, config.load_balance_scope)
    z = router_z(stats)
    routers = {"mean": 1, "sum": stats.z_B.shape[0]}[config.router_reduction]
    loss += routers * (weights.load_balance * balance + weights.router_z * z)
    terms |= {"loss/balance": balance, "loss/router_z": z}
    for name, weight, term in (
      ("sequence_balance", weights.sequence_balance,
       lambda: load_balance(stats, "sequence")),
      ("mutual_information", weights.mutual_information,
       lambda: mutual_information(stats)),
      ("router_entropy", weights.router_entropy, lambda: router_entropy(stats)),
    ):  # fmt: skip
      if not isinstance(weight, float) or weight:
        terms[f"loss/{name}"] = term()
        loss += routers * weight * terms[f"loss/{name}"]
  return loss, {"loss/total": loss, **terms}


def router_metrics(stats: RouterStats) -> dict[str, Array]:
  """What the routers did, over all rows; means over layers.

  `router/entropy` is the mean entropy of the router's probabilities as a share
  of its maximum, ln E; `router/max_over_mean` the busiest expert's load over
  the fair share, of the worst layer; `router/dropped` the share of assignments
  that went nowhere for want of room; `router/unrouted` the share of tokens that
  no expert sees; `router/experts_per_token` the mean number of experts that do.
  """
  count_LE = stats.count_BE.sum(1)
  E, choices = count_LE.shape[-1], stats.prob_BE.shape[-1]
  routed_L, dropped = count_LE.sum(-1), stats.dropped_B.sum()
  tokens = _at_least_one(stats.tokens_B.sum())
  entropy = stats.entropy_B.sum() / tokens
  return {
    "router/entropy": (
      entropy / jnp.log(choices) if choices > 1 else jnp.ones(())
    ),
    "router/unrouted": stats.unrouted_B.sum() / tokens,
    "router/experts_per_token": routed_L.sum() / tokens,
    "router/max_over_mean": (
      E * count_LE.max(-1) / _at_least_one(routed_L)
    ).max(),
    "router/dropped": dropped / _at_least_one(routed_L.sum() + dropped),
  }


def load_shares(stats: RouterStats) -> Array:
  """[L, E] share of each layer's assignments by expert."""
  count_LE = stats.count_BE.sum(1)
  return count_LE / _at_least_one(count_LE.sum(-1, keepdims=True))


def _at_least_one(x: Array) -> Array:
  """A denominator for counts that may be zero: zero sums then stay zero."""
  return jnp.maximum(x, 1.0)
