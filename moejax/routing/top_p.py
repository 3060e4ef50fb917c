# SPDX-License-Identifier: Apache-2.0
"""As many experts as a token needs (Huang et al. 2024).

"Harder tasks need more experts", arXiv:2403.07652.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Routing

Array = jax.Array


def top_p(
  logits_TE: Array,
  mask_T: Array,
  *,
  p: float,
  k: int,
  rng: Array | None = None,
) -> Routing:
  """The fewest experts whose probabilities sum to p, k at most.

  Weights are the probabilities. Places that a token leaves empty cost nothing
  in a ragged dispatch; the metric `router/experts_per_token` has their mean.
  The paper keeps tokens from taking ever more experts by `loss.router_entropy`.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere.
    p: in (0, 1].
    k: experts per token at most.
    rng: not used.

  Raises:
    ConfigError: p outside (0, 1].
  """
  del rng
  if not 0 < p <= 1:
    raise ConfigError(f"model.moe.router: p={p} is not in (0, 1]")
  weight_TX, expert_TX = jax.lax.top_k(jax.nn.softmax(logits_TE, axis=-1), k)
  before_TX = jnp.cumsum(weight_TX, axis=-1) - weight_TX
  return Routing.from_token_choice(
    expert_TX, weight_TX, logits_TE, mask_T, unused_TX=before_TX >= p
  )
