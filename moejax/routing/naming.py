# SPDX-License-Identifier: Apache-2.0
"""How a config names a router: `top_k(k=8)`, or a dotted path."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os

from moejax.errors import ConfigError
from moejax.routing.base import Router, bare
from moejax.routing.inputs import input_names
from moejax.spec import Spec


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
    known = routers_of(module)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? It" if near else "it"
    raise ConfigError(
      f"model.moe.router: {module_name} has no router {name!r}; {hint} has "
      f"{', '.join(known)}"
    )
  router = getattr(module, name)
  _check_options(router, spec)
  _check_types(router, spec)
  return functools.partial(router, **spec.kwargs)


def routers_of(module) -> list[str]:
  """Names of a module's routers: functions of logits and a mask."""
  found = inspect.getmembers(module, inspect.isfunction)
  return [
    name for name, f in found
    if list(inspect.signature(f).parameters)[:2] == ["logits_TE", "mask_T"]
  ]  # fmt: skip


def home_of(router: Router) -> str | None:
  """The folder to import a router of one's own from; None for built-in ones."""
  package = bare(router).__module__.partition(".")[0]
  if package in ("moejax", "__main__"):
    return None
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.has_location:
    return None  # made in a notebook
  folders = spec.submodule_search_locations
  found = folders[0] if folders else spec.origin
  return os.path.dirname(os.path.abspath(found))


def _check_types(router: Router, spec: Spec) -> None:
  """By the router's own annotations, where it has them."""
  parameters = inspect.signature(router).parameters
  for name, value in spec.kwargs.items():
    kind = parameters[name].annotation
    if kind is float and type(value) is int:
      continue
    if kind in (int, float, str, bool) and type(value) is not kind:
      raise ConfigError(
        f"model.moe.router: {spec.name}: {name}={value!r} must be "
        f"{kind.__name__}, not {type(value).__name__}"
      )


def _check_options(router: Router, spec: Spec) -> None:
  inputs = input_names(router)
  if given := sorted(set(spec.kwargs) & set(inputs)):
    raise ConfigError(
      f"model.moe.router: {spec.name} is given its {', '.join(given)} by the "
      "model; leave it out"
    )
  try:
    inspect.signature(router).bind(
      None, None, **dict.fromkeys(inputs), **spec.kwargs
    )
  except TypeError as e:
    parameters = list(inspect.signature(router).parameters)[2:]
    options = [p for p in parameters if p not in inputs]
    unknown = sorted(set(spec.kwargs) - set(options))
    what = f"no option {', '.join(unknown)}" if unknown else str(e)
    near = difflib.get_close_matches(unknown[0], options, 1) if unknown else []
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise ConfigError(
      f"model.moe.router: {spec.name}: {what}{hint} its options: "
      f"{', '.join(options) or 'none'}"
    ) from e
