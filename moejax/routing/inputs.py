# SPDX-License-Identifier: Apache-2.0
"""What a router may ask for beside the logits, by the names of its parameters.

`rng`         a random key a token, [T]; None in evaluation and generation
`token_T`     int32, the tokens' ids
`position_T`  int32, their places in their documents
`bias_E`      float32, a bias that balances (`moejax.routing.balance`)

and further logits of its own, learned as the first ones are: `projects`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from moejax.errors import ConfigError
from moejax.routing.base import Router, bare, file_of

OF_TOKENS = ("token_T", "position_T")
BIAS = "bias_E"


def projects(**widths: str | int) -> Callable[[Router], Router]:
  """Gives a router further logits: one more learned matrix for each.

    @projects(noise_TE="num_experts")
    def noisy(logits_TE, mask_T, *, k, noise_TE, rng=None): ...

  Args:
    **widths: for each parameter of the router, its last axis: "num_experts",
      the name of an option of the router, or a number.
  """

  def mark(router: Router) -> Router:
    router.projections = widths
    return router

  return mark


def projections_of(router: Router, num_experts: int) -> dict[str, int]:
  """The width of each of a router's further logits.

  Raises:
    ConfigError: a width that is no positive integer, an option or a parameter
      that the router does not have.
  """
  found = {}
  for name, width in _projections(router).items():
    _check_projection(router, name, width)
    number, what = width, width
    if width == "num_experts":
      number = num_experts
    elif isinstance(width, str):
      number = option(router, width)
    else:
      what = name
    if type(number) is not int or number < 1:
      raise ConfigError(
        f"model.moe.router: {what}={number!r} must be a positive integer"
      )
    found[name] = number
  return found


def _check_projection(router: Router, name: str, width: str | int) -> None:
  where = f"model.moe.router: {file_of(router)}: projects({name}={width!r})"
  if not asks_for(router, name):
    raise ConfigError(f"{where}: the router has no parameter {name}")
  if width == "num_experts" or not isinstance(width, str):
    return
  if width not in (options := option_names(router)):
    raise ConfigError(
      f'{where}: no option {width}; use "num_experts", a number or one of its '
      f"options: {', '.join(options) or 'none'}"
    )


def input_names(router: Router) -> list[str]:
  """Parameters that the model gives, of those that the router takes."""
  known = ("rng", BIAS, *OF_TOKENS, *_projections(router))
  return [name for name in known if asks_for(router, name)]


def option_names(router: Router) -> list[str]:
  """Parameters that a config gives."""
  inputs = input_names(router)
  parameters = inspect.signature(router).parameters.values()
  return [
    p.name for p in list(parameters)[2:]
    if p.name not in inputs and p.kind is not p.VAR_KEYWORD
  ]  # fmt: skip


def takes_rng(router: Router) -> bool:
  """Whether it has a place for keys, `**` of a function around it included."""
  parameters = inspect.signature(router).parameters.values()
  return any(p.name == "rng" or p.kind is p.VAR_KEYWORD for p in parameters)


def asks_for(router: Router, name: str) -> bool:
  """Whether the router has a parameter of this name."""
  return name in inspect.signature(router).parameters


def option(router: Router, name: str) -> Any:
  """An option as it is bound, or else its default."""
  if isinstance(router, functools.partial) and name in router.keywords:
    return router.keywords[name]
  return inspect.signature(router).parameters[name].default


def made_up_inputs(
  router: Router, num_experts: int, T: int, seed: int = 0
) -> dict[str, Any]:
  """What a router asks for beside logits and `rng`, of T tokens of no text.

  For trying it out: normal logits, no bias, each token its own document.
  """
  rng = np.random.default_rng(seed)
  inputs: dict[str, Any] = {
    name: jnp.asarray(rng.standard_normal((T, width)), jnp.float32)
    for name, width in projections_of(router, num_experts).items()
  }
  known = {
    "token_T": jnp.asarray(rng.integers(0, 256, T), jnp.int32),
    "position_T": jnp.zeros(T, jnp.int32),
    BIAS: jnp.zeros(num_experts, jnp.float32),
  }
  return inputs | {n: x for n, x in known.items() if asks_for(router, n)}


def _projections(router: Router) -> dict[str, str | int]:
  return getattr(bare(router), "projections", {})
