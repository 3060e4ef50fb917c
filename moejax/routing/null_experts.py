# SPDX-License-Identifier: Apache-2.0
"""Token choice among experts and nothings (Zeng et al. 2024).

"AdaMoE: token-adaptive routing with null experts", arXiv:2406.13233.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Routing
from moejax.routing.inputs import projects

Array = jax.Array


@projects(null_TN="num_null")
def null_experts(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  num_null: int,
  null_TN: Array,
  rng: Array | None = None,
) -> Routing:
  """The k best of all experts and `num_null` that do nothing and cost nothing.

  Weights are renormalised over the true experts among them; a token that chose
  none passes through the layer unchanged. The load-balancing loss counts null
  experts too, as one load shared evenly among them, and so draws the mean
  number of true experts towards k * E / (E + num_null).

  Args:
    logits_TE: float32 logits of the true experts.
    mask_T: bool, False for padding, which goes nowhere.
    k: choices per token, null ones included.
    num_null: null experts N.
    null_TN: their logits.
    rng: not used.

  Raises:
    ConfigError: k below 2: a weight that is renormalised alone is always 1.
  """
  del rng
  if k < 2:
    raise ConfigError(
      f"model.moe.router: null_experts(k={k}) renormalises, which gives the "
      "router no gradient with one choice; use k >= 2"
    )
  E = logits_TE.shape[-1]
  # Null experts behind the true ones.
  all_TE = jnp.concatenate([logits_TE, null_TN], axis=-1)
  chosen_TX, choice_TX = jax.lax.top_k(jax.nn.softmax(all_TE, axis=-1), k)
  true_TX = choice_TX < E
  weight_TX = jnp.where(true_TX, chosen_TX, 0.0)
  total_T1 = weight_TX.sum(-1, keepdims=True)
  weight_TX /= jnp.where(total_T1 > 0, total_T1, 1.0)
  routing = Routing.from_token_choice(
    choice_TX, weight_TX, logits_TE, mask_T, unused_TX=~true_TX
  )
  return routing.replace(
    null_TN=null_TN, counted_A=choice_TX.reshape(-1).astype(jnp.int32)
  )
