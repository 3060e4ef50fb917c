# SPDX-License-Identifier: Apache-2.0
"""Token choice under learned noise (Shazeer et al. 2017, arXiv:1701.06538)."""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Routing
from moejax.routing.inputs import projects

Array = jax.Array


@projects(noise_TE="num_experts")
def noisy_top_k(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  noise_TE: Array,
  rng: Array | None = None,
) -> Routing:
  """The k best of `logits + normal * softplus(noise)`; weights their softmax.

  Both matrices start at the model's init, near the paper's zeros: noise of
  standard deviation ln 2, which the loss then makes larger or smaller expert by
  expert. Evaluation and generation (`rng` None) are without noise. The paper
  balances by its importance and load losses; here `loss.load_balance` does.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere.
    k: experts per token, at least 2: the softmax of one is 1, without gradient.
    noise_TE: the router's second logits.
    rng: one key per token, shape [T].

  Raises:
    ConfigError: k below 2.
  """
  if k < 2:
    raise ConfigError(
      f"model.moe.router: noisy_top_k with k={k} gives the router no gradient; "
      "use k >= 2"
    )
  noisy_TE = logits_TE
  if rng is not None:
    E = logits_TE.shape[-1]
    normal_TE = jax.vmap(lambda key: jax.random.normal(key, (E,)))(rng)
    noisy_TE = logits_TE + normal_TE * jax.nn.softplus(noise_TE)
  best_TX, expert_TX = jax.lax.top_k(noisy_TE, k)
  weight_TX = jax.nn.softmax(best_TX.astype(jnp.float32), axis=-1)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)
