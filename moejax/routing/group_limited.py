# SPDX-License-Identifier: Apache-2.0
"""Token choice within a few groups of experts, balanced by a bias.

DeepSeek-V3 (arXiv:2412.19437): groups are the nodes that a token may be sent
to; a bias an expert, which only the choice sees, takes the place of most of the
balancing loss (Wang et al. 2024, arXiv:2408.15664).
"""

import math

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.balance import check_rate
from moejax.routing.base import Routing
from moejax.routing.sigmoid import sigmoid_shares

Array = jax.Array

_EPSILON = 1e-20  # added to the sum of the weights, as DeepSeek's code has it


def group_limited(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  num_groups: int = 1,
  topk_groups: int = 1,
  scale: float = 1.0,
  renormalize: bool = True,
  bias_rate: float = 0.001,
  bias_E: Array | None = None,
  rng: Array | None = None,
) -> Routing:
  """Sends each token to k experts of its best groups, by sigmoid scores.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere.
    k: experts per token.
    num_groups: groups of neighbouring experts, as many in each.
    topk_groups: groups that a token may visit: those whose two best experts
      have the highest sum.
    scale: factor of the weights.
    renormalize: divide the k weights by their sum first.
    bias_rate: what the bias of an expert changes by after a step, up if it got
      less than the mean load, down if more; 0 keeps it. The training step does
      that (`moejax.routing.balance`).
    bias_E: added to the scores for the choice, not for the weights; None is 0.
    rng: not used.

  Raises:
    ConfigError: experts that do not make equal groups of at least two, groups
      that hold fewer than k, renormalisation at k = 1, a scale that is not
      positive, or a rate below 0.
  """
  del rng
  E = logits_TE.shape[-1]
  _check(E, k, num_groups, topk_groups)
  _check_weights(k, scale, renormalize)
  check_rate(bias_rate)
  score_TE = jax.nn.sigmoid(logits_TE)
  choice_TE = score_TE if bias_E is None else score_TE + bias_E[None]
  choice_TE = jax.lax.stop_gradient(choice_TE)
  if topk_groups < num_groups:
    choice_TE = _within_groups(choice_TE, num_groups, topk_groups)
  _, expert_TX = jax.lax.top_k(choice_TE, k)
  chosen_TX = jnp.take_along_axis(logits_TE, expert_TX, axis=-1)
  if renormalize:
    weight_TX = sigmoid_shares(chosen_TX, _EPSILON)
  else:
    weight_TX = jax.nn.sigmoid(chosen_TX)
  routing = Routing.from_token_choice(
    expert_TX, scale * weight_TX, logits_TE, mask_T
  )
  _, unbiased_TX = jax.lax.top_k(jax.lax.stop_gradient(score_TE), k)
  return routing.replace(
    prob_TE=sigmoid_shares(logits_TE),
    # The paper's complementary loss (equation 18) knows no bias and no groups.
    counted_A=unbiased_TX.reshape(-1).astype(jnp.int32),
  )


def _within_groups(
  choice_TE: Array, num_groups: int, topk_groups: int
) -> Array:
  """-inf outside each token's best groups; G is the groups here."""
  T, E = choice_TE.shape
  best_two = jax.lax.top_k(choice_TE.reshape(T, num_groups, -1), 2)[0]
  group_TG = best_two.sum(-1)
  _, kept = jax.lax.top_k(group_TG, topk_groups)
  kept_TG = jax.nn.one_hot(kept, num_groups, dtype=bool).any(1)
  kept_TE = jnp.repeat(kept_TG, E // num_groups, axis=1)
  return jnp.where(kept_TE, choice_TE, -jnp.inf)


def _check_weights(k: int, scale: float, renormalize: bool) -> None:
  if renormalize and k == 1:
    raise ConfigError(
      "model.moe.router: renormalize=True with k=1 gives the router no "
      "gradient; use k >= 2 or renormalize=False"
    )
  if not 0 < scale < math.inf:
    raise ConfigError(
      f"model.moe.router: scale={scale} must be positive: at 0 experts add "
      "nothing and learn nothing"
    )


def _check(E: int, k: int, num_groups: int, topk_groups: int) -> None:
  size = E // num_groups if num_groups > 0 else 0
  if size < 2 or size * num_groups != E:
    raise ConfigError(
      f"model.moe.router: {E} experts do not make num_groups={num_groups} "
      "equal groups of two or more"
    )
  if not 0 < topk_groups <= num_groups:
    raise ConfigError(
      f"model.moe.router: topk_groups={topk_groups} is not in [1, {num_groups}]"
    )
  if k > topk_groups * size:
    raise ConfigError(
      f"model.moe.router: {topk_groups} groups of {size} hold fewer than "
      f"k={k} experts; raise topk_groups"
    )
