# SPDX-License-Identifier: Apache-2.0
"""Many routers in one program, loads as bad as they can be among them.

Compiling is what a cell of the grid costs, so one router stands for all: which
it is at the moment, it reads from its bias.
"""

import jax
import jax.numpy as jnp

from moejax import routing
from moejax.routing import Routing
from moejax.routing.inputs import asks_for

X, NULLS, STEP = 2, 3, 1000.0


def one_expert(logits_TE, mask_T):
  """All tokens to expert 5."""
  T = logits_TE.shape[0]
  return _choose(jnp.full((T, 1), 5), logits_TE, mask_T)


def two_experts(logits_TE, mask_T):
  """Experts 0 and 7 or 7 and 0; the others get nothing."""
  first_T = logits_TE[:, 0] > logits_TE[:, 1]
  expert_TX = jnp.where(
    first_T[:, None], jnp.array([[0, 7]]), jnp.array([[7, 0]])
  )
  return _choose(expert_TX, logits_TE, mask_T)


def _choose(expert_TX, logits_TE, mask_T):
  prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  weight_TX = jnp.take_along_axis(prob_TE, expert_TX, axis=-1)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)


def _of(router, **options):
  """The router with what it asks for, of all that `any_of` was given."""

  def run(logits_TE, mask_T, **inputs):
    asked = {n: x for n, x in inputs.items() if asks_for(router, n)}
    return router(logits_TE, mask_T, **options, **asked)

  return run


ROUTERS = {
  "top_k": _of(routing.top_k, k=X, renormalize=True),
  "sigmoid": _of(routing.top_k, k=X, score="sigmoid"),
  "jitter": _of(routing.top_k, k=X, jitter=0.3),
  "group_limited": _of(routing.group_limited, k=X, num_groups=4, topk_groups=2),
  "recycle": _of(routing.recycle, group_size=8),
  "drop": _of(routing.recycle, group_size=8, overflow="drop"),
  "switch": _of(routing.switch, k=X, group_size=8, capacity_factor=1.0),
  "noisy_top_k": _of(routing.noisy_top_k, k=X),
  "loss_free": _of(routing.loss_free, k=X),
  "attention_heads": _of(routing.attention_heads, k=X),
  "hash_tokens": _of(routing.hash_tokens, k=X),
  "random_choice": _of(routing.random_choice, k=X),
  "sinkhorn": _of(routing.sinkhorn, k=X, group_size=16),
  "top_p": _of(routing.top_p, k=X, p=0.15),
  "null_experts": _of(routing.null_experts, k=X, num_null=NULLS),
  "forced_balance": _of(routing.forced_balance, k=X),
  "one_expert": _of(one_expert),
  "two_experts": _of(two_experts),
}


def bias_of(name: str, noise):
  """The bias that makes `any_of` this router."""
  return noise + STEP * list(ROUTERS).index(name)


@routing.projects(noise_TE="num_experts", null_TN="num_null")
def any_of(
  logits_TE, mask_T, *, k, noise_TE, null_TN, token_T, position_T,
  num_null=NULLS, bias_E=None, rng=None,
):  # fmt: skip
  """The router that the bias says; all of X experts a token."""
  assert (k, num_null) == (X, NULLS)
  number = jnp.round(bias_E.mean() / STEP).astype(jnp.int32)
  inputs = {
    "bias_E": bias_E - STEP * number, "noise_TE": noise_TE, "null_TN": null_TN,
    "token_T": token_T, "position_T": position_T, "rng": rng,
  }  # fmt: skip

  def branch(router):
    return lambda: _filled_up(router(logits_TE, mask_T, **inputs))

  return jax.lax.switch(number, [branch(r) for r in ROUTERS.values()])


def _filled_up(given: Routing) -> Routing:
  """With X experts a token, the missing ones unused, and all fields set."""
  T, E = given.logits_TE.shape
  missing = X - given.experts_per_token
  pad = lambda x, fill: jnp.pad(
    x.reshape(T, -1), ((0, 0), (0, missing)), constant_values=fill
  ).reshape(-1)
  unused_A, counted_A = given.unused_A, given.counted_A
  wanted_A = given.expert_A if given.wanted_A is None else given.wanted_A
  if counted_A is None:
    counted_A = jnp.where(wanted_A < E, wanted_A, E + NULLS)
  if unused_A is None:
    unused_A = jnp.zeros(given.expert_A.shape, bool)
  prob_TE = given.prob_TE
  if prob_TE is None:
    prob_TE = jax.nn.softmax(given.all_logits_TE)
  null_TN = given.null_TN
  if null_TN is None:  # as if there were none
    null_TN = jnp.full((T, NULLS), -1e9)
  return Routing(
    token_A=jnp.repeat(jnp.arange(T, dtype=jnp.int32), X),
    expert_A=pad(given.expert_A, E),
    weight_A=pad(given.weight_A, 0.0),
    logits_TE=given.logits_TE,
    prob_TE=jnp.pad(prob_TE, ((0, 0), (0, E + NULLS - prob_TE.shape[1]))),
    wanted_A=pad(wanted_A.astype(jnp.int32), E),
    counted_A=pad(counted_A.astype(jnp.int32), E + NULLS),
    null_TN=null_TN,
    unused_A=pad(unused_A, True),
    experts_per_token=X,
  )
