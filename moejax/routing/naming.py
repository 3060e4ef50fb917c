# SPDX-License-Identifier: Apache-2.0
"""How a config names a router: `top_k(k=8)`, or a dotted path."""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import traceback
import types

from moejax.errors import ConfigError
from moejax.routing.base import Router, bare, file_of, short_path
from moejax.routing.calling import in_a_line, innermost
from moejax.routing.inputs import input_names, option_names
from moejax.spec import Spec

# As annotations may be written.
_KINDS = {kind.__name__: kind for kind in (int, float, str, bool)}


def resolve(spec: Spec) -> Router:
  """The router a config names, with its options bound.

  Bare names live in `moejax.routing`; dotted names in any importable module.

  Raises:
    ConfigError: no such module or function, a module that cannot be imported,
      a function that cannot be a router, or options it does not take.
  """
  module_name, _, name = spec.name.rpartition(".")
  module_name = module_name or "moejax.routing"
  if spec.is_of_python:
    raise ConfigError(
      f"model.moe.router: {spec.name} is of Python's own library, which has no "
      "routers"
    )
  module = _imported(module_name, spec)
  known = routers_of(module)
  if not _may_be_router(module, name, known):
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}? It" if near else "it"
    raise ConfigError(
      f"model.moe.router: {module_name} has no router {name!r}; {hint} has "
      f"{', '.join(known) or 'none'}"
    )
  router = getattr(module, name)
  if not callable(router):
    raise ConfigError(
      f"model.moe.router: {spec.name} is a {type(router).__name__}, not a "
      "function; name a router of that file: MODULE.FUNCTION"
    )
  _check_first(router, spec)
  _check_options(router, spec)
  _check_types(router, spec)
  return functools.partial(router, **spec.kwargs)


def _may_be_router(
  module: types.ModuleType, name: str, known: list[str]
) -> bool:
  """Whether a module has it, and it is neither a class nor a helper of ours."""
  if not hasattr(module, name) or inspect.isclass(getattr(module, name)):
    return False
  return module.__name__ != "moejax.routing" or name in known


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


def _imported(module_name: str, spec: Spec) -> types.ModuleType:
  try:
    return importlib.import_module(module_name)
  except ModuleNotFoundError as e:
    if e.name is not None and f"{module_name}.".startswith(f"{e.name}."):
      raise ConfigError(
        f"model.moe.router: no module {module_name!r} ({e}); the working "
        "directory and the config's folder are importable"
      ) from e
    raise _cannot_import(spec, e) from e
  except Exception as e:  # whatever a person's code may raise
    raise _cannot_import(spec, e) from e


def _cannot_import(spec: Spec, e: Exception) -> ConfigError:
  """Names the line of the person's file, not of the import's machinery."""
  if isinstance(e, SyntaxError) and e.filename:
    where = f"{short_path(e.filename)}:{e.lineno}"
    return ConfigError(
      f"model.moe.router: {spec.name}: {where} raised {type(e).__name__}: "
      f"{e.msg}"
    )
  machinery = (__file__, importlib.__file__)
  files = [f.filename for f in traceback.extract_tb(e.__traceback__)]
  theirs = [
    file for file in files
    if file not in machinery and not file.startswith("<frozen")
  ]  # fmt: skip
  where = "its module"
  if theirs and (frame := innermost(e, theirs[0])):
    where = f"{short_path(frame.filename)}:{frame.lineno}"
  return ConfigError(
    f"model.moe.router: {spec.name}: {where} raised {in_a_line(e)}"
  )


def _check_first(router: Router, spec: Spec) -> None:
  """Whether it can be called as (logits_TE, mask_T), by position."""
  first = list(inspect.signature(router).parameters.values())[:2]
  names = [p.name for p in first if p.kind is not p.KEYWORD_ONLY]
  variadic = any(p.kind is p.VAR_POSITIONAL for p in first)
  given = {"rng", *input_names(router)}
  swapped = names[:1] == ["mask_T"] or names[1:] == ["logits_TE"]
  if variadic and not swapped:
    return
  if len(names) < 2 or swapped or given & set(names):
    raise ConfigError(
      f"model.moe.router: {spec.name} ({file_of(router)}): its first "
      "parameters must be logits_TE, mask_T, in this order"
    )


def _check_types(router: Router, spec: Spec) -> None:
  """By the router's own annotations, or else by its defaults."""
  parameters = inspect.signature(router).parameters
  for name, value in spec.kwargs.items():
    if name not in parameters:
      continue  # of a function around it, which takes any
    parameter, why = parameters[name], ""
    kind = parameter.annotation
    kind = _KINDS[kind] if kind in tuple(_KINDS) else kind
    if kind is parameter.empty:
      kind = type(parameter.default)
      why = f", as its default {parameter.default!r} is"
    if kind is float and type(value) is int:
      continue
    if kind in _KINDS.values() and type(value) is not kind:
      raise ConfigError(
        f"model.moe.router: {spec.name}: {name}={value!r} must be "
        f"{kind.__name__}{why}, not {type(value).__name__}"
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
    options = option_names(router)
    unknown = sorted(set(spec.kwargs) - set(options))
    what = f"no option {', '.join(unknown)}" if unknown else str(e)
    near = difflib.get_close_matches(unknown[0], options, 1) if unknown else []
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise ConfigError(
      f"model.moe.router: {spec.name}: {what}{hint} its options: "
      f"{', '.join(options) or 'none'}"
    ) from e
  _check_k(router, spec)


def _check_k(router: Router, spec: Spec) -> None:
  """A config alone says how many experts a token has, which sizes follow."""
  parameters = inspect.signature(router).parameters
  if "k" not in parameters or "k" in spec.kwargs:
    return
  k = parameters["k"].default
  if type(k) is int and k != 1:
    named = Spec(spec.name, {"k": k, **spec.kwargs})
    raise ConfigError(
      f"model.moe.router: {spec.name} has k={k} by default, but the k in its "
      f"name counts parameters and FLOPs; write k={k} in its name: {named}"
    )
