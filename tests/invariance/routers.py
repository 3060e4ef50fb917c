# SPDX-License-Identifier: Apache-2.0
"""Many routers in one program, loads as bad as they can be among them.

Compiling is what a cell of the grid costs, so one router stands for all: which
it is at the moment, it reads from its bias.
"""

import functools

import jax
import jax.numpy as jnp

from moejax.routing import Routing, group_limited, recycle, top_k

X, STEP = 2, 1000.0


def one_expert(logits_TE, mask_T, *, rng, bias_E):
  """All tokens to expert 5."""
  T = logits_TE.shape[0]
  return _choose(jnp.full((T, 1), 5), logits_TE, mask_T)


def two_experts(logits_TE, mask_T, *, rng, bias_E):
  """Experts 0 and 7 or 7 and 0; the others get nothing."""
  first_T = logits_TE[:, 0] > logits_TE[:, 1]
  expert_TX = jnp.where(
    first_T[:, None], jnp.array([[0, 7]]), jnp.array([[7, 0]])
  )
  return _choose(expert_TX, logits_TE, mask_T)


def uniform(logits_TE, mask_T, *, rng, bias_E):
  """Exactly as many to each, but for padding."""
  T, E = logits_TE.shape
  token_TX = jnp.arange(T)[:, None] + jnp.arange(X)[None]
  return _choose(token_TX % E, logits_TE, mask_T)


def _choose(expert_TX, logits_TE, mask_T):
  prob_TE = jax.nn.softmax(logits_TE, axis=-1)
  weight_TX = jnp.take_along_axis(prob_TE, expert_TX, axis=-1)
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)


def _stateless(router, **options):
  return lambda logits_TE, mask_T, *, rng, bias_E: router(
    logits_TE, mask_T, rng=rng, **options
  )


ROUTERS = {
  "top_k": _stateless(top_k, k=X, renormalize=True),
  "sigmoid": _stateless(top_k, k=X, score="sigmoid"),
  "jitter": _stateless(top_k, k=X, jitter=0.3),
  "group_limited": functools.partial(
    group_limited, k=X, num_groups=4, topk_groups=2
  ),
  "recycle": _stateless(recycle, group_size=8),
  "drop": _stateless(recycle, group_size=8, overflow="drop"),
  "one_expert": one_expert,
  "two_experts": two_experts,
  "uniform": uniform,
}


def bias_of(name: str, noise):
  """The bias that makes `any_of` this router."""
  return noise + STEP * list(ROUTERS).index(name)


def any_of(logits_TE, mask_T, *, k, bias_E=None, rng=None):
  """The router that the bias says; all of X experts a token."""
  assert k == X
  number = jnp.round(bias_E.mean() / STEP).astype(jnp.int32)
  bias_E = bias_E - STEP * number

  def branch(router):
    return lambda: _filled_up(router(logits_TE, mask_T, rng=rng, bias_E=bias_E))

  return jax.lax.switch(number, [branch(r) for r in ROUTERS.values()])


def _filled_up(routing: Routing) -> Routing:
  """With X experts a token, the missing ones nowhere, and all fields set."""
  T, E = routing.logits_TE.shape
  missing = X - routing.experts_per_token
  pad = lambda x, fill: jnp.pad(
    x.reshape(T, -1), ((0, 0), (0, missing)), constant_values=fill
  ).reshape(-1)
  wanted_A = routing.wanted_A
  wanted_A = routing.expert_A if wanted_A is None else wanted_A
  prob_TE = routing.prob_TE
  return Routing(
    token_A=jnp.repeat(jnp.arange(T, dtype=jnp.int32), X),
    expert_A=pad(routing.expert_A, E),
    weight_A=pad(routing.weight_A, 0.0),
    logits_TE=routing.logits_TE,
    prob_TE=jax.nn.softmax(routing.logits_TE) if prob_TE is None else prob_TE,
    wanted_A=pad(wanted_A.astype(jnp.int32), E),
    experts_per_token=X,
  )


def expert_choice(logits_TE, mask_T, *, group_size, rng=None):
  """Each expert takes its best quarter of each group (Zhou et al. 2022)."""
  T, E = logits_TE.shape
  group_size = min(group_size, T)  # the few tokens of `init_variables`
  prob_TE = jnp.where(mask_T[:, None], jax.nn.softmax(logits_TE, axis=-1), 0.0)
  groups = prob_TE.reshape(-1, group_size, E)
  weight, token = jax.lax.top_k(groups.swapaxes(1, 2), group_size // 4)
  first = jnp.arange(T // group_size)[:, None, None] * group_size
  expert = jnp.broadcast_to(jnp.arange(E)[None, :, None], token.shape)
  token_A = (token + first).reshape(-1)
  return Routing(
    token_A=token_A.astype(jnp.int32),
    expert_A=jnp.where(mask_T[token_A], expert.reshape(-1), E),
    weight_A=weight.reshape(-1),
    logits_TE=logits_TE,
  )
