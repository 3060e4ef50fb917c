# SPDX-License-Identifier: Apache-2.0
"""Where in the variables each router and its state stand."""

import dataclasses
import functools
import operator
from typing import Any

import jax

from moejax.config import LayerConfig, ModelConfig
from moejax.routing.balance import NAME

Array = jax.Array


def as_router_state(config: ModelConfig, values_LE: Array) -> dict[str, Any]:
  """Values of all routers, in their order, as a tree like `router_state`.

  Args:
    config: of the model.
    values_LE: one row for each router, as `ModelOutput.stats` has them.
  """
  tree: dict[str, Any] = {}
  first = 0
  for i, layer in enumerate(config.prefix_layers):
    for kind in routers_of(layer):
      _put(tree, (f"prefix_{i}", kind), values_LE[first])
      first += 1
  kinds = [
    (f"block_{j}", kind)
    for j, layer in enumerate(config.pattern_layers)
    for kind in routers_of(layer)
  ]
  R = config.num_repeats
  stacked = values_LE[first:].reshape(R, len(kinds), values_LE.shape[-1])
  for p, path in enumerate(kinds):
    if config.scan_layers:
      _put(tree, ("repeats", *path), stacked[:, p])
      continue
    for r in range(R):
      _put(tree, (f"repeats_{r}", *path), stacked[r, p])
  return tree


def routers_of(layer: LayerConfig) -> list[str]:
  """Modules of a layer that have a router, in the order of its stats."""
  mixer = ["attention"] if layer.mixer == "moa" else []
  return mixer + (["moe"] if layer.ffn == "moe" else [])


@dataclasses.dataclass(frozen=True)
class RouterPlace:
  """The module of one router.

  Attributes:
    path: of the module in a collection of variables.
    repeat: which one, where a scan stacks them along the first axis; else None.
  """

  path: tuple[str, ...]
  repeat: int | None = None

  @property
  def kind(self) -> str:
    """`moe` or `attention`."""
    return self.path[-1]

  def of(self, collection: Any, name: str) -> Any:
    """The module's own of what the collection has under that name."""
    module = functools.reduce(operator.getitem, self.path, collection)
    if self.repeat is None:
      return module[name]
    return jax.tree.map(lambda x: x[self.repeat], module[name])


def router_places(config: ModelConfig) -> list[RouterPlace]:
  """Of all routers, in the order of `ModelOutput.stats`."""
  places = [
    RouterPlace((f"prefix_{i}", kind))
    for i, layer in enumerate(config.prefix_layers)
    for kind in routers_of(layer)
  ]
  for r in range(config.num_repeats):
    for j, layer in enumerate(config.pattern_layers):
      for kind in routers_of(layer):
        path = (f"block_{j}", kind)
        places.append(
          RouterPlace(("repeats", *path), r)
          if config.scan_layers
          else RouterPlace((f"repeats_{r}", *path))
        )
  return places


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Array) -> None:
  for key in path:
    tree = tree.setdefault(key, {})
  tree[NAME] = value
