# SPDX-License-Identifier: Apache-2.0
"""Which file a run's router was: a config names it, its text may change."""

import functools
import hashlib
import importlib.util
import inspect
from pathlib import Path

from moejax.config import Config
from moejax.routing import resolve
from moejax.routing.base import bare


def router_files(config: Config) -> dict[str, str]:
  """SHA-256 of the files of a router of one's own, by module; else empty.

  The module that the config names, and the one that defines the function. As
  this process imported them: what is edited later it does not run.

  Raises:
    ConfigError: no such router.
  """
  spec = config.model.moe.router_spec
  function = inspect.unwrap(bare(resolve(spec)))
  modules = {spec.name.rpartition(".")[0], function.__module__}
  own = (m for m in modules if m and not _is_built_in(m))
  found = {module: _when_imported(module) for module in sorted(own)}
  return {module: digest for module, digest in found.items() if digest}


def changed_files(recorded: dict[str, str]) -> list[str]:
  """Files, or modules without one, that are not what `router_files` saw."""
  return [
    str(file_of(module) or module)
    for module, digest in recorded.items()
    if _digest(module) != digest
  ]


def file_of(module: str) -> Path | None:
  """The file that an import would read; None if there is none.

  The module itself is not run: it may be broken by now.
  """
  try:
    spec = importlib.util.find_spec(module)
  except (ImportError, ValueError):
    return None  # its package is gone, or it was made in a notebook
  if spec is None or not spec.has_location or spec.origin is None:
    return None
  return Path(spec.origin)


def _is_built_in(module: str) -> bool:
  return module.partition(".")[0] in ("moejax", "__main__")


def _digest(module: str) -> str:
  """Empty where there is no file."""
  path = file_of(module)
  if path is None or not path.is_file():
    return ""
  return hashlib.sha256(path.read_bytes()).hexdigest()


_when_imported = functools.cache(_digest)
