# SPDX-License-Identifier: Apache-2.0
"""Token choice from a balanced plan: Sinkhorn's iterations on the logits.

Clark et al. 2022 (arXiv:2202.01169, "S-BASE"), after the balanced assignment of
BASE layers (Lewis et al. 2021, arXiv:2103.16716).
"""

import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.routing.base import Routing
from moejax.routing.capacity import check_groups

Array = jax.Array

_NEVER = -1e30  # a logarithm of zero that adds up without NaN


def sinkhorn(
  logits_TE: Array,
  mask_T: Array,
  *,
  k: int,
  group_size: int,
  iterations: int = 16,
  rng: Array | None = None,
) -> Routing:
  """The k largest entries of each token's row of the balanced plan.

  In training, the plan of a group is `exp(logits)` with rows and columns scaled
  so that each token has the same mass and each expert too; it carries no
  gradient. Weights are the softmax of the logits at the chosen experts. The
  choice from the plan is near balance, not exactly in it. Evaluation and
  generation (`rng` None) choose by the logits themselves, as BASE does, since
  who else is in the batch must not matter there.

  Args:
    logits_TE: float32 router logits.
    mask_T: bool, False for padding, which goes nowhere and has no mass.
    k: experts per token.
    group_size: tokens that are balanced together, neighbours in the batch; a
      divisor of the row length.
    iterations: of Sinkhorn's scaling.
    rng: not None in training.

  Raises:
    ConfigError: tokens that do not make whole groups, or no iteration.
  """
  T, E = logits_TE.shape
  if iterations < 1:
    raise ConfigError(
      f"model.moe.router: iterations={iterations} must be positive"
    )
  choice_TE = jax.lax.stop_gradient(logits_TE)
  if rng is not None:
    check_groups(T, group_size)
    plan = lambda logits, mask: balanced_plan(logits, mask, iterations)
    choice_TE = jax.vmap(plan)(
      choice_TE.reshape(-1, group_size, E), mask_T.reshape(-1, group_size)
    ).reshape(T, E)
  _, expert_TX = jax.lax.top_k(choice_TE, k)
  prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  weight_TX = jnp.take_along_axis(prob_TE, expert_TX, axis=-1)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)


def balanced_plan(logits_TE: Array, mask_T: Array, iterations: int) -> Array:
  """The plan's logarithms: real tokens' rows sum to one over their number.

  Columns sum to 1/E, the better the more iterations; padding has -1e30.
  """
  logits_TE = jnp.where(mask_T[:, None], logits_TE, _NEVER)
  per_token = -jnp.log(jnp.maximum(mask_T.sum(), 1).astype(jnp.float32))
  per_expert = -jnp.log(float(logits_TE.shape[1]))

  def scale(_, of_expert_E):
    rows_T = jax.nn.logsumexp(logits_TE + of_expert_E[None], axis=1)
    of_token_T = jnp.where(mask_T, per_token - rows_T, 0.0)
    columns_E = jax.nn.logsumexp(logits_TE + of_token_T[:, None], axis=0)
    return per_expert - columns_E

  # From the data, so that devices may each have their own.
  start_E = logits_TE[0] * 0.0
  of_expert_E = jax.lax.fori_loop(0, iterations, scale, start_E)
  plan_TE = logits_TE + of_expert_E[None]
  rows_T1 = jax.nn.logsumexp(plan_TE, axis=1, keepdims=True)
  return jnp.where(mask_T[:, None], plan_TE - rows_T1 + per_token, _NEVER)
