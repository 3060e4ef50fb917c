# SPDX-License-Identifier: Apache-2.0
"""Expert choice: each expert takes its best tokens (Zhou et al. 2022).

arXiv:2202.09368. Loads are equal by construction, and a token may get many
experts or none. Which tokens an expert takes depends on the later ones of the
group, so a model that was trained this way cannot generate.
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Routing, non_causal
from moejax.routing.capacity import check_groups

Array = jax.Array


@non_causal
def expert_choice(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  group_size: int,
  rng: Array | None = None,
) -> Routing:
  """Each expert takes `group_size * k / E` tokens of each group.

  Args:
    logits_TE: float32 router logits; the softmax is over experts, and an expert
      prefers the tokens that give it most.
    mask_T: bool, False for padding, which no expert keeps: of a group with
      padding experts may get fewer.
    k: experts per token in the mean, the paper's capacity factor.
    group_size: tokens that compete, neighbours in the batch; a divisor of the
      row length.
    rng: not used.

  Raises:
    ConfigError: groups that do not fit, or that give an expert no token, or
      more than there are.
  """
  del rng
  T, E = logits_TE.shape
  check_groups(T, group_size)
  taken, rest = divmod(group_size * k, E)
  if rest or not 0 < taken <= group_size:
    raise ConfigError(
      f"model.moe.router: group_size={group_size} times k={k} over {E} experts "
      "must be a whole number of tokens in [1, group_size]; use a multiple of "
      f"{E} for group_size"
    )
  G = T // group_size
  prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  real_TE = jnp.where(mask_T[:, None], prob_TE, -1.0)
  by_expert = real_TE.reshape(G, group_size, E).swapaxes(1, 2)
  weight_GEC, place_GEC = jax.lax.top_k(by_expert, taken)
  first_G = jnp.arange(G, dtype=jnp.int32) * group_size
  token_A = (place_GEC + first_G[:, None, None]).reshape(-1).astype(jnp.int32)
  expert_E = jnp.arange(E, dtype=jnp.int32)[None, :, None]
  expert_A = jnp.broadcast_to(expert_E, place_GEC.shape).reshape(-1)
  real_A = mask_T[token_A]
  return Routing(
    token_A=token_A,
    expert_A=jnp.where(real_A, expert_A, E),
    weight_A=jnp.where(real_A, weight_GEC.reshape(-1), 0.0),
    logits_TE=logits_TE,
    capacity=G * taken,
  )
