# SPDX-License-Identifier: Apache-2.0
"""A router tried on a few tokens before it is believed.

What it returns is known only when it runs, and by then within a compiled
program; so it is run once on made-up logits when the model is traced first.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import ConfigError
from moejax.routing.base import (
  Router,
  Routing,
  bare,
  file_of,
  is_causal,
)
from moejax.routing.calling import call_router
from moejax.routing.inputs import (
  BIAS,
  OF_TOKENS,
  asks_for,
  made_up_inputs,
  option,
)

Array = jax.Array

_TOKENS = 16
# A hash leaves one of 512 experts out of 16 * 512 tokens once in 17,000 times.
_TRIES = 16
_FAVOR = 8.0
_tried: set[tuple[Router, str, int]] = set()


def probe_tokens(router: Router) -> int:
  """How many tokens it can be tried on: a group, if it has groups."""
  if not asks_for(router, "group_size"):
    return _TOKENS
  size = option(router, "group_size")
  if type(size) is not int or size < 1:
    raise ConfigError(
      f"model.moe.router: group_size={size!r} must be a positive integer"
    )
  return size


def experts_of_a_token(
  router: Router, num_experts: int, name: str
) -> int | None:
  """How many a token has, in the mean over any batch.

  None if the logits decide that (`top_p`, `null_experts`), or if a router has
  neither a fixed number nor an option k that says it.

  Args:
    router: with its options bound.
    num_experts: E.
    name: as the config writes it.

  Raises:
    ConfigError: what it returns is no Routing, or an exception in it.
  """
  inputs = _inputs(router, num_experts, probe_tokens(router), 0)
  logits_TE = inputs.pop("logits_TE")
  mask_T = jnp.ones(len(logits_TE), bool)
  routing = jax.eval_shape(
    lambda *args: call_router(router, name, *args), logits_TE, mask_T, None,
    inputs,
  )  # fmt: skip
  if routing.unused_A is not None:
    return None
  if routing.experts_per_token:
    return routing.experts_per_token
  k = option(router, "k") if asks_for(router, "k") else None
  return k if type(k) is int else None


def probe(router: Router, num_experts: int, name: str) -> None:
  """Runs a router in training and in evaluation, and looks at what it says.

  Once for each function, name and number of experts: a function that was edited
  in a notebook is another one. Experts that it never chooses are a note.

  Args:
    router: with its options bound.
    num_experts: E.
    name: as the config writes it.

  Raises:
    ConfigError: an exception in it, experts or tokens that do not exist, an
      expert twice for one token, weights or logits that are not finite, shares
      that are none, more tokens than the capacity, padding that is sent to
      experts, or choices that in evaluation depend on later tokens without the
      mark `non_causal`.
  """
  if (tried := (bare(router), name, num_experts)) in _tried:
    return
  # Also where the caller is being traced.
  with jax.ensure_compile_time_eval():
    _probe(router, num_experts, name)
  _tried.add(tried)


def _probe(router: Router, num_experts: int, name: str) -> None:
  where = f"router {name} ({file_of(router)})"
  T = probe_tokens(router)
  mask_T = np.arange(T) != 1
  inputs = _inputs(router, num_experts, T, 0)
  keys_T = jax.random.split(jax.random.key(0), T)
  run = _compiled(router, name)
  _check_values(run(inputs, mask_T, keys_T), mask_T, num_experts, where)
  first = run(inputs, mask_T, None)
  _check_values(first, mask_T, num_experts, where)
  if is_causal(router):
    others = _inputs(router, num_experts, T, 1)
    second = run(_with_later_half(inputs, others), mask_T, None)
    half = T // 2
    same = np.array_equal(_table(first)[:half], _table(second)[:half])
    if not same:
      raise ConfigError(
        f"{where}: choices for a token depend on later tokens; mark it with "
        "@moejax.routing.non_causal, and it is refused in generation"
      )
  _note_unchosen(run, router, num_experts, where)


def _compiled(
  router: Router, name: str
) -> Callable[[dict[str, Array], np.ndarray, Array | None], Routing]:
  """Its routing, fetched, of inputs, a mask and keys or None."""

  @jax.jit
  def run(inputs, mask_T, keys_T):
    further = dict(inputs)
    logits_TE = further.pop("logits_TE")
    return call_router(router, name, logits_TE, mask_T, keys_T, further)

  return lambda *args: jax.device_get(run(*args))


def _with_later_half(
  inputs: dict[str, Array], others: dict[str, Array]
) -> dict[str, Array]:
  """The inputs, those of the later tokens from others."""
  found = dict(inputs)
  for key in inputs.keys() - {BIAS}:
    half = inputs[key].shape[0] // 2
    found[key] = jnp.concatenate([inputs[key][:half], others[key][half:]])
  return found


def _note_unchosen(
  run: Callable[..., Routing], router: Router, E: int, where: str
) -> None:
  """Says which experts it never chooses though logits favor each in turn."""
  T = probe_tokens(router)
  unchosen, tried = set(range(E)), 0
  while unchosen and tried < _TRIES * E:
    inputs = _inputs(router, E, T, 2 + tried)
    token_T = tried + np.arange(T)
    favored_TE = np.arange(E)[None] == token_T[:, None] % E
    inputs["logits_TE"] += _FAVOR * favored_TE
    for key in OF_TOKENS:  # each its own, as a choice may be by them alone
      if key in inputs:
        inputs[key] = jnp.asarray(token_T, jnp.int32)
    routing = run(inputs, np.ones(T, bool), None)
    unchosen -= set(routing.expert_A.tolist())
    if routing.wanted_A is not None:
      unchosen -= set(routing.wanted_A.tolist())
    tried += T
  if unchosen and jax.process_index() == 0:
    first, more = sorted(unchosen)[:8], len(unchosen) - 8
    which = ", ".join(map(str, first)) + (f" and {more} more" * (more > 0))
    print(
      f"note: {where} never chose expert {which} on {tried} made-up tokens "
      f"that favor each in turn; experts are 0 to {E - 1}",
      file=sys.stderr,
    )


def _inputs(router: Router, E: int, T: int, seed: int) -> dict[str, Array]:
  drawn = np.random.default_rng(100 + seed).standard_normal((T, E))
  logits_TE = jnp.asarray(drawn, jnp.float32)
  more = made_up_inputs(router, E, T, seed)
  return {"logits_TE": logits_TE, **more}


def _check_values(
  routing: Routing, mask_T: np.ndarray, E: int, where: str
) -> None:
  expert_A, token_A = routing.expert_A, routing.token_A
  if expert_A.size and not 0 <= expert_A.min() <= expert_A.max() <= E:
    raise ConfigError(
      f"{where}: experts from {expert_A.min()} to {expert_A.max()}, but there "
      f"are {E}, from 0 to {E - 1} ({E} means nowhere)"
    )
  T = mask_T.shape[0]
  if token_A.size and not 0 <= token_A.min() <= token_A.max() < T:
    raise ConfigError(
      f"{where}: tokens from {token_A.min()} to {token_A.max()}, but there are "
      f"{T}, from 0 to {T - 1}"
    )
  X = routing.experts_per_token
  if X and not np.array_equal(token_A, np.repeat(np.arange(T), X)):
    raise ConfigError(
      f"{where}: with experts_per_token={X}, assignment a must be of token "
      f"a // {X}; leave it at 0 for any other order"
    )
  if not np.isfinite(routing.weight_A).all():
    raise ConfigError(f"{where}: weight_A has numbers that are not finite")
  _check_counted(routing, mask_T, E, where)
  _check_logits(routing, where)
  most = np.bincount(expert_A, minlength=E + 1)[:E].max()
  if routing.capacity and most > routing.capacity:
    raise ConfigError(
      f"{where}: capacity={routing.capacity}, but an expert has {most} tokens"
    )
  if (expert_A[~mask_T[token_A]] < E).any():
    raise ConfigError(
      f"{where}: sends padding to experts; where mask_T is False, expert_A "
      "must be E, nowhere (Routing.from_token_choice does it)"
    )
  there_A = expert_A < E
  pairs = token_A[there_A].astype(np.int64) * E + expert_A[there_A]
  pair, times = np.unique(pairs, return_counts=True)
  if (times > 1).any():
    twice = pair[times.argmax()]
    raise ConfigError(
      f"{where}: token {twice // E} has expert {twice % E} {times.max()} "
      "times, and its load counts as often; give each expert once, with the "
      "sum of its weights"
    )


def _check_counted(
  routing: Routing, mask_T: np.ndarray, E: int, where: str
) -> None:
  """The experts that metrics and the balancing loss count.

  Those beyond would count nowhere, and the loss would be 0.
  """
  real_A = mask_T[routing.token_A]
  choices = routing.all_logits_TE.shape[-1]
  for field, number in (("wanted_A", E), ("counted_A", choices)):
    found_A = getattr(routing, field)
    if found_A is None:
      continue
    if (found_A < 0).any():
      raise ConfigError(f"{where}: {field} has experts below 0")
    if (found_A[real_A] > number).any():
      raise ConfigError(
        f"{where}: {field} has experts up to {found_A[real_A].max()}, but "
        f"there are {number}, from 0 to {number - 1} ({number} means nowhere)"
      )


def _check_logits(routing: Routing, where: str) -> None:
  """Logits and shares, of which losses and metrics are."""
  if not np.isfinite(routing.all_logits_TE).all():
    raise ConfigError(
      f"{where}: logits_TE or null_TN of its Routing have numbers that are not "
      "finite, though those that it was given are"
    )
  prob_TE = routing.prob_TE
  if prob_TE is None:
    return
  sums_T = prob_TE.sum(-1)
  if not np.allclose(sums_T, 1.0, atol=1e-3):
    raise ConfigError(
      f"{where}: prob_TE must be shares that sum to 1, not to "
      f"{sums_T.min():.3g} to {sums_T.max():.3g}"
    )
  if (prob_TE < 0).any():
    raise ConfigError(
      f"{where}: prob_TE must be shares from 0 to 1, not from "
      f"{prob_TE.min():.3g} to {prob_TE.max():.3g}"
    )


def _table(routing: Routing) -> np.ndarray:
  """[T, E + 1]: the weight that each token gives each expert."""
  T, E = routing.logits_TE.shape
  table = np.zeros((T, E + 1))
  np.add.at(table, (routing.token_A, routing.expert_A), routing.weight_A)
  return table
