# SPDX-License-Identifier: Apache-2.0
"""What a router decides, as data, and how a config names one.

A router is a pure function

    router(logits_TE, mask_T, *, rng=None, **options) -> Routing

in any importable file. `rng` holds one random key per token (shape [T]), or
None when nothing may be random (evaluation, generation), so that noise does
not depend on how a batch is split over devices or microbatches.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp

from moejax.errors import ConfigError
from moejax.spec import Spec

Array = jax.Array
Router = Callable[..., "Routing"]


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
      1 and carrying gradient; None is the softmax of the logits.
    wanted_A: where a capacity may send an assignment elsewhere, the expert that
      the router chose, for the balancing loss; None is `expert_A`.
    experts_per_token: X if assignment `a` belongs to token `a // X`, else 0.
      Dispatch then moves rows by permutation instead of scatter.
  """

  token_A: Array
  expert_A: Array
  weight_A: Array
  logits_TE: Array
  prob_TE: Array | None = None
  wanted_A: Array | None = None
  experts_per_token: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def num_experts(self) -> int:
    return self.logits_TE.shape[-1]

  @classmethod
  def from_token_choice(
    cls, expert_TX: Array, weight_TX: Array, logits_TE: Array, mask_T: Array
  ) -> Self:
    """Each token names its X experts; masked tokens go nowhere.

    Args:
      expert_TX: integers below E.
      weight_TX: combine weight of each.
      logits_TE: as the router was given them.
      mask_T: as the router was given it.

    Raises:
      ConfigError: shapes that do not fit, or experts that are no integers.
    """
    _check_choice(expert_TX, weight_TX, logits_TE)
    T, X = expert_TX.shape
    E = logits_TE.shape[-1]
    expert_TX = jnp.where(mask_T[:, None], expert_TX, E)
    weight_TX = jnp.where(mask_T[:, None], weight_TX, 0.0)
    return cls(
      token_A=jnp.repeat(jnp.arange(T, dtype=jnp.int32), X),
      expert_A=expert_TX.reshape(-1).astype(jnp.int32),
      weight_A=weight_TX.reshape(-1),
      logits_TE=logits_TE,
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


def _check_choice(expert_TX, weight_TX, logits_TE) -> None:
  """What goes wrong most in a router of one's own, the arguments' order."""
  shapes = f"experts {expert_TX.shape}, weights {weight_TX.shape}"
  if expert_TX.shape != weight_TX.shape or expert_TX.ndim != 2:
    raise ConfigError(
      f"router: {shapes} for logits {logits_TE.shape}; both must be [T, X]"
    )
  if not jnp.issubdtype(expert_TX.dtype, jnp.integer):
    raise ConfigError(
      f"router: experts are {expert_TX.dtype}, not integers; the order is "
      "from_token_choice(expert_TX, weight_TX, logits_TE, mask_T), while "
      "jax.lax.top_k returns values first"
    )


def check_routing(routing: Any, name: str) -> "Routing":
  """What a router returned, if it is one.

  Raises:
    ConfigError: naming the router, if it is not.
  """
  if not isinstance(routing, Routing):
    raise ConfigError(
      f"router {name} returned {type(routing).__name__}, not a Routing; "
      "Routing.from_token_choice makes one"
    )
  A = routing.token_A.shape
  if routing.expert_A.shape != A or routing.weight_A.shape != A:
    raise ConfigError(
      f"router {name}: token_A {A}, expert_A {routing.expert_A.shape} and "
      f"weight_A {routing.weight_A.shape} must be one list, [A]"
    )
  return routing


def non_causal(router: Router) -> Router:
  """Marks a router whose choices for a token depend on later tokens."""
  router.causal = False
  return router


def is_causal(router: Router) -> bool:
  """Whether the router may be used for generation."""
  inner = router.func if isinstance(router, functools.partial) else router
  return getattr(inner, "causal", True)


def resolve(spec: Spec) -> Router:
  """The router a config names, with its options bound.

  Bare names live in `moejax.routing`; dotted names in any importable module.

  Raises:
    ConfigError: no such module or function, or options it does not take.
  """
  module_name, _, name = spec.name.rpartition(".")
  module_name = module_name or "moejax.routing"
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as e:
    raise ConfigError(
      f"model.moe.router: no module {module_name!r} ({e}); the working "
      "directory and the config's folder are importable"
    ) from e
  if not hasattr(module, name):
    raise ConfigError(
      f"model.moe.router: {module_name} has no router {name!r}; it has "
      f"{', '.join(_routers(module))}"
    )
  router = getattr(module, name)
  if "bias_E" in spec.kwargs:
    raise ConfigError(f"model.moe.router: {name} sets its bias_E itself")
  _check_options(router, spec)
  return functools.partial(router, **spec.kwargs)


def home_of(router: Router) -> str | None:
  """The folder to import a router of one's own from; None for built-in ones."""
  inner = router.func if isinstance(router, functools.partial) else router
  package = inner.__module__.partition(".")[0]
  if package == "moejax":
    return None
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.has_location:
    return None  # made in a notebook
  folders = spec.submodule_search_locations
  found = folders[0] if folders else spec.origin
  return os.path.dirname(os.path.abspath(found))


def _routers(module) -> list[str]:
  """Functions of a module that take logits and a mask."""
  found = inspect.getmembers(module, inspect.isfunction)
  return [
    name for name, f in found
    if list(inspect.signature(f).parameters)[:2] == ["logits_TE", "mask_T"]
  ]  # fmt: skip


def _check_options(router: Router, spec: Spec) -> None:
  try:
    inspect.signature(router).bind(None, None, rng=None, **spec.kwargs)
  except TypeError as e:
    parameters = list(inspect.signature(router).parameters)[2:]
    options = [p for p in parameters if p not in ("rng", "bias_E")]
    unknown = sorted(set(spec.kwargs) - set(options))
    what = f"no option {', '.join(unknown)}" if unknown else str(e)
    raise ConfigError(
      f"model.moe.router: {spec.name}: {what}; its options: "
      f"{', '.join(options)}"
    ) from e
