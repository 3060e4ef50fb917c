# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts language models: train, study, convert.

Modules are imported when they are first used, so `import moejax` takes no time
and `moejax.convert.load_hf(...)` needs no other import.
"""

import importlib
import types

_MODULES = (
  "analysis", "checkpoint", "config", "convert", "data", "describe", "dispatch",
  "errors", "evaluate", "experts", "generate", "losses", "metrics", "models",
  "ops", "optimizer", "plan", "report", "routing", "runs", "sampling",
  "scaling", "step", "sweep", "train",
)  # fmt: skip


def __getattr__(name: str) -> types.ModuleType:
  if name not in _MODULES:
    raise AttributeError(f"module 'moejax' has no attribute {name!r}")
  return importlib.import_module(f"moejax.{name}")


def __dir__() -> list[str]:
  return sorted(_MODULES)
