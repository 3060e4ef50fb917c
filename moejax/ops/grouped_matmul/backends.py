# SPDX-License-Identifier: Apache-2.0
"""Which back ends there are, and which one a platform gets."""

import importlib
import types
import warnings

import jax

from moejax.errors import ConfigError

_SUMMARY = {
  "reference": "every expert for every row, float32; E times the work",
  "cpu": "one scipy BLAS product per group, on XLA's threads",
  "cpu_loops": "row tiles in XLA loops; any platform, no BLAS needed",
  "tpu": "megablox Pallas kernels, tiles chosen from the sizes",
  "gpu": "tokamax's Triton and Mosaic kernels, else lax.ragged_dot",
}
_AUTO = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}
_ANYWHERE = ("reference", "cpu_loops")
_COST = {
  "cpu_loops": "XLA loops run at about 0.6 of its speed",
  "reference": "it does E times the arithmetic",
}


def kernels_of(name: str) -> types.ModuleType:
  """The module with a back end's `gmm`, `gmm_transposed` and `tgmm`."""
  if name not in (*_SUMMARY, "batched"):
    raise ConfigError(
      f"unknown grouped_matmul backend {name!r}; "
      f"known: auto, {', '.join(_SUMMARY)}"
    )
  return importlib.import_module(f"moejax.ops.grouped_matmul.{name}")


def choose_backend(
  platform: str | None = None, requested: str = "auto"
) -> tuple[str, str]:
  """Resolves `requested` to a back end; call it once, at start-up.

  Args:
    platform: what the program will run on ("cpu", "tpu", "gpu"); None asks jax.
    requested: a name, or "auto". Only "auto" falls back (with a warning that
      says why and what it costs); a name that cannot run is a ConfigError.

  Returns:
    The name, for `grouped_matmul(backend=...)`, and a line for the log.
  """
  platform = platform or jax.default_backend()
  name = requested
  if requested == "auto":
    name = _AUTO.get(platform)
    if name is None:
      return _fall_back("reference", f"no kernel for platform {platform!r}")
  reason = kernels_of(name).unavailable()
  if requested == "auto" and reason:
    return _fall_back("cpu_loops" if name == "cpu" else "reference", reason)
  if name not in _ANYWHERE and name != _AUTO.get(platform):
    reason = f"it is for {name}, not {platform}"
  if reason:
    raise ConfigError(
      f"grouped_matmul backend {requested!r} cannot run: {reason}"
    )
  line = f"{name} ({requested} on {platform}): {_SUMMARY[name]}"
  slow = getattr(kernels_of(name), "slow", lambda: None)()
  if slow:
    line += f"; slow: {slow}"
    warnings.warn(f"grouped_matmul: {slow}", stacklevel=2)
  return name, line


def describe() -> str:
  """A line per back end: what it does, and why it cannot run or is slow."""
  lines = []
  for name, summary in _SUMMARY.items():
    module = kernels_of(name)
    said = module.unavailable() or getattr(module, "slow", lambda: None)()
    lines.append(f"{name}: {summary}" + (f" [{said}]" if said else ""))
  return "\n".join(lines)


def _fall_back(name: str, reason: str) -> tuple[str, str]:
  line = f"grouped_matmul falls back to {name!r}: {reason}; {_COST[name]}"
  warnings.warn(line, stacklevel=3)
  return name, line
