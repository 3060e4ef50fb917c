# SPDX-License-Identifier: Apache-2.0
"""What each router chose, token by token, for those who ask.

Sums leave a forward pass always (`ModelOutput.stats`); choices only where the
collection "routing" is mutable, else nothing of this is in the program:

  output, state = model.apply(variables, tokens_BT, rows, mutable=["routing"])
  watched = watched_routers(model.config, state["routing"])
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.models.router_state import router_places
from moejax.routing import Choices, Routing

Array = jax.Array

COLLECTION = "routing"
_NAME = "watched"


@flax.struct.dataclass
class Watched:
  """What a router saw and chose; leading axes may be stacked routers.

  Attributes:
    x_BTD: the tokens, as router and experts are given them.
    choices: of the router.
  """

  x_BTD: Array
  choices: Choices


def choices_if_watched(
  module: nn.Module, routing: Routing, mask_BT: Array
) -> Choices | None:
  """The choices, if the caller of the model wants them."""
  if module.is_initializing() or not module.is_mutable_collection(COLLECTION):
    return None
  return Choices.of(routing, mask_BT)


def record(module: nn.Module, x_BTD: Array, choices: Choices | None) -> None:
  """Hands them to the caller of the model."""
  if choices is not None:
    module.put_variable(COLLECTION, _NAME, Watched(x_BTD, choices))


def watched_routers(config: ModelConfig, collection: Any) -> Watched:
  """All routers in the order of `ModelOutput.stats`, stacked [L, ...].

  Args:
    config: of the model.
    collection: what `apply` returns as "routing".
  """
  found = [place.of(collection, _NAME) for place in router_places(config)]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *found)
