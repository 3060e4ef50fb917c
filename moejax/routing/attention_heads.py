# SPDX-License-Identifier: Apache-2.0
"""The routing of mixtures of attention heads, and of JetMoE's experts.

Zhang et al. 2022 (arXiv:2210.05144), equation 6; JetMoE, arXiv:2404.07413. For
`moa` layers, whose queries and outputs one routing serves, and for experts.
"""

import jax

from moejax.errors import ConfigError
from moejax.routing.base import Routing

Array = jax.Array


def attention_heads(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  detach: bool = True,
  rng: Array | None = None,
) -> Routing:
  """The k most probable experts, weights over their sum.

  With `detach`, as the paper writes it, no gradient flows through that sum: the
  values are those of `top_k(renormalize=True)`, the gradients are not, and one
  expert a token (k = 1) trains its router too. JetMoE's code, a softmax over
  the chosen logits, is `top_k(renormalize=True)`.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere.
    k: experts per token.
    detach: whether the sum is a constant to the gradient.
    rng: not used.

  Raises:
    ConfigError: k = 1 without `detach`, which leaves no gradient.
  """
  del rng
  if k == 1 and not detach:
    raise ConfigError(
      "model.moe.router: k=1 with detach=False gives the router no gradient; "
      "use k >= 2 or detach=True"
    )
  weight_TX, expert_TX = jax.lax.top_k(jax.nn.softmax(logits_TE, axis=-1), k)
  total_T1 = weight_TX.sum(-1, keepdims=True)
  if detach:
    total_T1 = jax.lax.stop_gradient(total_T1)
  return Routing.from_token_choice(
    expert_TX, weight_TX / total_T1, logits_TE, mask_T
  )
