# SPDX-License-Identifier: Apache-2.0
"""Token choice: each token visits its k best experts (Shazeer et al. 2017).

OLMoE keeps the softmax over all experts as weights; JetMoE, DBRX and Mixtral
renormalise over the chosen ones; DeepSeek-V3 scores by sigmoid.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Routing
from moejax.routing.sigmoid import sigmoid_shares

Array = jax.Array


def top_k(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  score: str = "softmax",
  renormalize: bool = False,
  jitter: float = 0.0,
  rng: Array | None = None,
) -> Routing:
  """Sends each token to the k experts with the highest scores.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere.
    k: experts per token.
    score: "softmax" over all experts, or "sigmoid" of each.
    renormalize: divide the k weights by their sum.
    jitter: in training, logits are multiplied by uniform noise in
      [1 - jitter, 1 + jitter] before the choice (after Fedus et al. 2021, who
      jitter the router's input).
    rng: one key per token, shape [T]; None switches the jitter off.

  Raises:
    ConfigError: an unknown score, a jitter outside [0, 1), or renormalisation
      at k = 1, which would make the weight 1 and leave the router without a
      gradient.
  """
  if score not in ("softmax", "sigmoid"):
    raise ConfigError(
      f"model.moe.router: score={score!r} is neither 'softmax' nor 'sigmoid'"
    )
  if renormalize and k == 1:
    raise ConfigError(
      "model.moe.router: renormalize=True with k=1 gives the router no "
      "gradient; use k >= 2 or renormalize=False"
    )
  if not isinstance(jitter, (int, float)) or not 0 <= jitter < 1:
    raise ConfigError(f"model.moe.router: jitter={jitter!r} is not in [0, 1)")
  noisy_TE = logits_TE
  if jitter and rng is not None:
    noisy_TE = logits_TE * _uniform(rng, logits_TE.shape[-1], jitter)
  if score == "softmax":
    scores_TE = jax.nn.softmax(noisy_TE, axis=-1)
    weight_TX, expert_TX = jax.lax.top_k(scores_TE, k)
    if renormalize:
      weight_TX /= weight_TX.sum(-1, keepdims=True)
  else:
    # The order of the scores, also where they round to the same number.
    best_TX, expert_TX = jax.lax.top_k(noisy_TE, k)
    shares = sigmoid_shares if renormalize else jax.nn.sigmoid
    weight_TX = shares(best_TX)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)


def _uniform(rng_T: Array, E: int, jitter: float) -> Array:
  """Noise of each token from its own key, whatever the batch's split."""
  draw = lambda key: jax.random.uniform(
    key, (E,), jnp.float32, 1.0 - jitter, 1.0 + jitter
  )
  return jax.vmap(draw)(rng_T)
