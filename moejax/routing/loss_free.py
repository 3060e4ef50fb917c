# SPDX-License-Identifier: Apache-2.0
"""Token choice, balanced by a bias in place of a loss.

Wang et al. 2024 (arXiv:2408.15664), as DeepSeek-V3 has it (arXiv:2412.19437);
`group_limited` is DeepSeek-V3's whole router.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.balance import check_rate
from moejax.routing.base import Routing
from moejax.routing.sigmoid import sigmoid_shares

Array = jax.Array


def loss_free(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  score: str = "sigmoid",
  bias_rate: float = 0.001,
  bias_E: Array | None = None,
  rng: Array | None = None,
) -> Routing:
  """The k experts with the highest score plus bias; weights are the scores.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere.
    k: experts per token.
    score: "sigmoid", as the paper trains, or "softmax".
    bias_rate: what the bias of an expert changes by after a step, up if it got
      less than the mean load of the global batch, down if more; 0 keeps it. The
      training step does that (`moejax.routing.balance`).
    bias_E: added to the scores for the choice, not for the weights; None is 0.
    rng: not used.

  Raises:
    ConfigError: an unknown score, or a rate below 0, which would send ever more
      tokens to the busiest experts.
  """
  del rng
  check_rate(bias_rate)
  if score not in ("sigmoid", "softmax"):
    raise ConfigError(
      f"model.moe.router: score={score!r} is neither 'softmax' nor 'sigmoid'"
    )
  if score == "sigmoid":
    score_TE = jax.nn.sigmoid(logits_TE)
    prob_TE = sigmoid_shares(logits_TE)
  else:
    score_TE = prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  choice_TE = score_TE if bias_E is None else score_TE + bias_E[None]
  _, expert_TX = jax.lax.top_k(jax.lax.stop_gradient(choice_TE), k)
  weight_TX = jnp.take_along_axis(score_TE, expert_TX, axis=-1)
  routing = Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)
  _, unbiased_TX = jax.lax.top_k(jax.lax.stop_gradient(score_TE), k)
  return routing.replace(
    prob_TE=prob_TE,
    # A balancing loss beside the bias is of the scores alone (DeepSeek-V3).
    counted_A=unbiased_TX.reshape(-1).astype(jnp.int32),
  )
