# SPDX-License-Identifier: Apache-2.0
"""Which back ends there are, and which one a platform gets."""
import importlib
import types
import warnings

import jax

_SUMMARY = {
    "reference": "every expert for every row, float32; E times the work",
    "cpu": "one scipy BLAS product per group, on XLA's threads",
    "cpu_loops": "row tiles in XLA loops; any platform, no BLAS needed",
    "tpu": "megablox Pallas kernels, tiles chosen from the sizes",
    "gpu": "tokamax's Triton and Mosaic kernels, else lax.ragged_dot",
}
_PLATFORM = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu",
             "rocm": "gpu"}


def kernels_of(name: str) -> types.ModuleType:
  """The module with a back end's `gmm`, `gmm_transposed` and `tgmm`."""
  if name not in _SUMMARY:
    raise ValueError(f"unknown grouped_matmul backend {name!r}; "
                     f"known: auto, {', '.join(_SUMMARY)}")
  return importlib.import_module(f"moejax.ops.grouped_matmul.{name}")


def choose_backend(
    platform: str | None = None, requested: str = "auto") -> tuple[str, str]:
  """Resolves `requested` to `(name, reason)`; a fallback is also a warning.

  Args:
    platform: what the program will run on ("cpu", "tpu", "gpu"); None asks jax.
    requested: a name, or "auto". A name that cannot run is a ValueError: only
      "auto" falls back.
  """
  platform = platform or jax.default_backend()
  if requested != "auto":
    reason = kernels_of(requested).unavailable()
    if reason:
      raise ValueError(f"grouped_matmul backend {requested!r}: {reason}")
    return requested, f"{requested} (requested): {_SUMMARY[requested]}"
  name = _PLATFORM.get(platform)
  if name is None:
    return _fall_back("reference", f"no kernel for platform {platform!r}")
  reason = kernels_of(name).unavailable()
  if reason is None:
    return name, f"{name} (platform {platform}): {_SUMMARY[name]}"
  return _fall_back("cpu_loops" if name == "cpu" else "reference", reason)


_COST = {
    "cpu_loops": "the XLA loops run at about half the speed",
    "reference": "it does E times the arithmetic",
}


def _fall_back(name: str, reason: str) -> tuple[str, str]:
  message = f"grouped_matmul falls back to {name!r}: {reason}; {_COST[name]}"
  warnings.warn(message, stacklevel=3)
  return name, message


def describe() -> str:
  """One line a back end: what it does, or why it cannot run here."""
  lines = []
  for name, summary in _SUMMARY.items():
    reason = kernels_of(name).unavailable()
    lines.append(f"{name}: {summary}" + (f" [no: {reason}]" if reason else ""))
  return "\n".join(lines)
