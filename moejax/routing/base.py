# SPDX-License-Identifier: Apache-2.0
"""What a router decides, as data.

A router is a pure function

    router(logits_TE, mask_T, *, rng=None, **options) -> Routing

in any importable file. `rng` holds one random key per token (shape [T]), or
None when nothing may be random (evaluation, generation), so that noise does
not depend on how a batch is split over devices or microbatches; a router that
has no such parameter is called without it. What else a router may ask for, by
the names of its parameters: `moejax.routing.inputs`.
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from moejax.errors import ConfigError

Array = jax.Array
Router = Callable[..., "Routing"]


class ChoiceError(ConfigError):
  """What `from_token_choice` cannot take; who calls a router adds its name."""


@flax.struct.dataclass
class Routing:
  """A flat list of assignments of tokens to experts.

  The list covers token choice, expert choice, padding and dropped tokens.

  Attributes:
    token_A: int32, which token.
    expert_A: int32, to which expert; E means nowhere (padding, dropped).
    weight_A: float32, combine weight, the router's gradient path.
    logits_TE: float32, for losses and metrics.
    prob_TE: shares of the experts that the balancing loss works on, summing to
      1 and carrying gradient; None is the softmax of the logits. Null experts
      follow the others.
    wanted_A: where a capacity may send an assignment elsewhere, the expert that
      the router chose; None is `expert_A`.
    counted_A: the expert that the balancing loss counts, where that is another
      one; null experts are E, E + 1, ...; None is `wanted_A`.
    null_TN: logits of null experts, which tokens may choose in place of others;
      they share the softmax and their load. None is for none.
    unused_A: True for assignments that go nowhere because the token needs no
      more experts, which are not dropped; None is for none.
    experts_per_token: X if assignment `a` belongs to token `a // X`, else 0.
      Dispatch then moves rows by permutation instead of scatter.
    capacity: assignments that any one expert has at most; 0 if that is not
      known. Dispatch may then use buffers of this many rows.
  """

  token_A: Array
  expert_A: Array
  weight_A: Array
  logits_TE: Array
  prob_TE: Array | None = None
  wanted_A: Array | None = None
  counted_A: Array | None = None
  null_TN: Array | None = None
  unused_A: Array | None = None
  experts_per_token: int = flax.struct.field(pytree_node=False, default=0)
  capacity: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def num_experts(self) -> int:
    return self.logits_TE.shape[-1]

  @property
  def all_logits_TE(self) -> Array:
    """Those of null experts behind the others'."""
    if self.null_TN is None:
      return self.logits_TE
    return jnp.concatenate([self.logits_TE, self.null_TN], axis=-1)

  @classmethod
  def from_token_choice(
    cls,
    expert_TX: Array,
    weight_TX: Array,
    logits_TE: Array,
    mask_T: Array,
    unused_TX: Array | None = None,
  ) -> Self:
    """Each token names its X experts; masked tokens go nowhere.

    Args:
      expert_TX: integers below E; any where `unused_TX`.
      weight_TX: combine weight of each.
      logits_TE: as the router was given them.
      mask_T: as the router was given it.
      unused_TX: bool, True for places that a token leaves empty on purpose:
        they go nowhere, and do not count as dropped; None is for none.

    Raises:
      ConfigError: shapes that do not fit, or experts that are no integers.
    """
    _check_choice(expert_TX, weight_TX, logits_TE, mask_T, unused_TX)
    T, X = expert_TX.shape
    E = logits_TE.shape[-1]
    used_TX = mask_T[:, None] if unused_TX is None else ~unused_TX
    used_TX &= mask_T[:, None]
    expert_TX = jnp.where(used_TX, expert_TX, E)
    weight_TX = jnp.where(used_TX, weight_TX, 0.0)
    return cls(
      token_A=jnp.repeat(jnp.arange(T, dtype=jnp.int32), X),
      expert_A=expert_TX.reshape(-1).astype(jnp.int32),
      weight_A=weight_TX.reshape(-1),
      logits_TE=logits_TE,
      unused_A=None if unused_TX is None else unused_TX.reshape(-1),
      experts_per_token=X,
    )

  @classmethod
  def of_rows(cls, expert: Array, weight: Array, num_experts: int) -> Self:
    """Rows that are assignments already, one expert each, E for nowhere.

    A second pass through the same experts: mixture of attention heads routes
    tokens on the way in and their heads, [A, ...], on the way out.

    Args:
      expert, weight: of any shape, flattened here.
      num_experts: E.
    """
    A = expert.size
    return cls(
      token_A=jnp.arange(A, dtype=jnp.int32),
      expert_A=expert.reshape(A),
      weight_A=weight.reshape(A),
      logits_TE=jnp.zeros((A, num_experts), jnp.float32),  # for its shape
      experts_per_token=1,
    )


def _check_choice(expert_TX, weight_TX, logits_TE, mask_T, unused_TX) -> None:
  """What goes wrong most in a router of one's own, the arguments' order."""
  order = (
    "the order is from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)"
  )
  T = logits_TE.shape[:1]
  if logits_TE.ndim != 2 or mask_T.shape != T or mask_T.dtype != bool:
    raise ChoiceError(
      f"logits are {logits_TE.dtype} {logits_TE.shape} and the mask "
      f"{mask_T.dtype} {mask_T.shape}, not [T, E] and bool [T]; {order}"
    )
  shape = expert_TX.shape
  if shape != weight_TX.shape or len(shape) != 2 or shape[:1] != T:
    raise ChoiceError(
      f"experts {shape}, weights {weight_TX.shape} for logits "
      f"{logits_TE.shape}; both must be [T, X]"
    )
  if not jnp.issubdtype(expert_TX.dtype, jnp.integer):
    raise ChoiceError(
      f"experts are {expert_TX.dtype}, not integers; {order}, while "
      "jax.lax.top_k returns values first"
    )
  if unused_TX is None:
    return
  if unused_TX.shape != shape or unused_TX.dtype != bool:
    raise ChoiceError(
      f"unused_TX is {unused_TX.dtype} {unused_TX.shape}, not bool {shape}"
    )


def check_routing(
  routing: Any, logits_TE: Array, router: Router, name: str
) -> "Routing":
  """What a router returned, if it is one; values are seen by `probe`.

  Raises:
    ConfigError: naming the router and its file, if it is not.
  """
  where = f"router {name} ({file_of(router)})"
  if not isinstance(routing, Routing):
    raise ConfigError(
      f"{where} returned {type(routing).__name__}, not a Routing; "
      "Routing.from_token_choice makes one"
    )
  A = routing.token_A.shape
  lists = {"expert_A": routing.expert_A, "weight_A": routing.weight_A}
  for field in ("wanted_A", "counted_A", "unused_A"):
    if getattr(routing, field) is not None:
      lists[field] = getattr(routing, field)
  if len(A) != 1 or any(x.shape != A for x in lists.values()):
    shapes = ", ".join(f"{field} {x.shape}" for field, x in lists.items())
    raise ConfigError(f"{where}: token_A {A}, {shapes} must be one list, [A]")
  for field in ("token_A", "expert_A", "wanted_A", "counted_A"):
    found = getattr(routing, field)
    if found is not None and not jnp.issubdtype(found.dtype, jnp.integer):
      raise ConfigError(f"{where}: {field} is {found.dtype}, not integers")
  if routing.logits_TE.shape != logits_TE.shape:
    raise ConfigError(
      f"{where}: logits_TE of its Routing is {routing.logits_TE.shape}, not "
      f"{logits_TE.shape} as it was given"
    )
  all_TE = routing.all_logits_TE.shape
  if routing.prob_TE is not None and routing.prob_TE.shape != all_TE:
    raise ConfigError(
      f"{where}: prob_TE is {routing.prob_TE.shape}, not {all_TE}"
    )
  X, T = routing.experts_per_token, logits_TE.shape[0]
  if X and A != (X * T,):
    raise ConfigError(
      f"{where}: experts_per_token={X} of {T} tokens are not {A[0]} assignments"
    )
  return routing


def non_causal(router: Router) -> Router:
  """Marks a router whose choices for a token depend on later tokens."""
  router.causal = False
  return router


def is_causal(router: Router) -> bool:
  """Whether the router may be used for generation."""
  return getattr(bare(router), "causal", True)


def bare(router: Router) -> Router:
  """The function without the options that were bound to it."""
  return router.func if isinstance(router, functools.partial) else router


def file_of(router: Router) -> str:
  """Where a person finds it."""
  code = code_of(router)
  return (
    f"{short_path(code.co_filename)}:{code.co_firstlineno}"
    if code
    else "a callable"
  )


def code_of(router: Router) -> Any:
  """The code of its function, also under `jax.jit`; None if it has none."""
  return getattr(inspect.unwrap(bare(router)), "__code__", None)


def short_path(path: str) -> str:
  """A path as it is written in the working directory."""
  here = os.path.join(os.getcwd(), "")
  return path.removeprefix(here)
