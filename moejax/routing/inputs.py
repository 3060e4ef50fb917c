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
from moejax.routing.base import Router, bare

OF_TOKENS = ("token_T", "position_T")
BIAS = "bias_E"


def projects(**widths: str) -> Callable[[Router], Router]:
  """Gives a router further logits: one more learned matrix for each.

    @projects(noise_TE="num_experts")
    def noisy(logits_TE, mask_T, *, k, noise_TE, rng=None): ...

  Args:
    **widths: for each parameter of the router, its last axis: "num_experts", or
      the name of an option of the router.
  """

  def mark(router: Router) -> Router:
    router.projections = widths
    return router

  return mark


def projections_of(router: Router, num_experts: int) -> dict[str, int]:
  """The width of each of a router's further logits.

  Raises:
    ConfigError: a width that is no positive integer.
  """
  found = {}
  for name, width in _projections(router).items():
    number = num_experts if width == "num_experts" else option(router, width)
    if type(number) is not int or number < 1:
      raise ConfigError(
        f"model.moe.router: {width}={number!r} must be a positive integer"
      )
    found[name] = number
  return found


def input_names(router: Router) -> list[str]:
  """Parameters that the model gives, of those that the router takes."""
  known = ("rng", BIAS, *OF_TOKENS, *_projections(router))
  return [name for name in known if asks_for(router, name)]


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


def _projections(router: Router) -> dict[str, str]:
  return getattr(bare(router), "projections", {})
