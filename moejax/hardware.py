# SPDX-License-Identifier: Apache-2.0
"""What a machine can do, and how its memory is made to serve."""

import ctypes
import importlib.util

import jax

# Dense bf16 FLOP/s of one device, from the vendors' data sheets.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Peak bf16 FLOP/s of a device; None where it is not known (CPUs)."""
  matches = [k for k in PEAK_FLOPS if device.device_kind.startswith(k)]
  return PEAK_FLOPS[max(matches, key=len)] if matches else None


def keep_freed_memory() -> bool:
  """Lets this process reuse big freed blocks; CPU runs need it to be fast.

  XLA's CPU client allocates a program's buffers anew for each run, and glibc
  gives blocks over 32 MiB back to the system at once, so that each step takes a
  page fault for every 4 KiB it writes: 39 ms of CPU time for adding 1 to a 33
  MB array, 5 ms with this setting (two Zen 3 cores). The price is that freed
  memory stays with the process. Call it before JAX starts its threads.

  Returns:
    Whether it was set: not where an accelerator's plugin is installed, nor
    where the C library is not glibc.
  """
  if any(importlib.util.find_spec(name) for name in _PLUGINS):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  # One arena: those of other threads hand blocks over 64 MiB to mmap anyway.
  settings = (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)
  taken = [mallopt(*setting) for setting in settings]
  return all(taken)


# With one of these, the host only feeds a device.
_PLUGINS = (
  "libtpu",
  "jax_cuda12_plugin",
  "jax_cuda13_plugin",
  "jax_rocm7_plugin",
)
# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
