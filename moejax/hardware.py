# SPDX-License-Identifier: Apache-2.0
"""What a machine can do, and how its memory is made to serve."""

import contextlib
import ctypes
import glob
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator

import jax

from moejax.files import cache_folder

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


def local_gpus() -> list[str]:
  """NVIDIA GPUs that this process may use, by number; no driver is asked."""
  if "CUDA_VISIBLE_DEVICES" in os.environ:
    return [g for g in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if g]
  folder = pathlib.Path("/proc/driver/nvidia/gpus")
  if not folder.is_dir():
    return []
  return [str(i) for i in range(len(list(folder.iterdir())))]


def keep_freed_memory() -> bool:
  """Lets this process reuse big freed blocks; CPU runs need it to be fast.

  XLA's CPU client allocates a program's buffers anew for each run, and glibc
  gives blocks over 32 MiB back to the system at once, so that each step takes a
  page fault for every 4 KiB it writes: 39 ms of CPU time for adding 1 to a 33
  MB array, 5 ms with this setting (two Zen 3 cores). The heap also asks for
  pages of 2 MiB, since reading experts' weights misses the TLB at every small
  page. The price is that freed memory stays with the process. Call it before
  JAX starts its threads.

  Returns:
    Whether it was set: not where there is an accelerator, nor where the C
    library is not glibc.
  """
  if any(glob.glob(pattern) for pattern in _ACCELERATORS):
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "mallopt"):
    return False
  # One arena: those of other threads hand blocks over 64 MiB to mmap anyway.
  settings = (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)
  if not all(libc.mallopt(*setting) for setting in settings):
    return False
  _ask_for_huge_pages(libc)
  return True


def keep_programs() -> None:
  """Keeps compiled programs in this user's cache, so that a restart is short.

  Never in the folder of a run: a program is code, and such a folder may come
  from elsewhere. Nothing is changed where JAX was told a folder before
  (`JAX_COMPILATION_CACHE_DIR`).
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  try:
    folder = cache_folder("programs") / _cpu()
  except RuntimeError:
    return  # a user without a home
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu() -> str:
  """Tells apart CPUs whose programs do not run on each other."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  flags = [line for line in lines if line.startswith(("flags", "Features"))]
  text = "\n".join([platform.platform(), *flags[:1]])
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
  """Marks the heap to come; only addresses are taken, no memory.

  A refusal (another system, a limit on addresses) costs speed alone.
  """
  if not hasattr(libc, "madvise"):
    return
  libc.malloc.restype = ctypes.c_void_p
  libc.malloc.argtypes = [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  size = machine_memory() // 2
  address = libc.malloc(size)
  if not address:
    return
  first = -(-address // _HUGE_PAGE) * _HUGE_PAGE
  libc.madvise(first, address + size - first, _MADV_HUGEPAGE)
  libc.free(address)  # the heap keeps it, as set above


_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
# With one of these, the host only feeds a device. Named by drivers, since a
# plugin may be here to plan for chips that are not.
_ACCELERATORS = (
  "/dev/accel*",
  "/dev/kfd",
  "/dev/nvidia[0-9]*",
  "/dev/vfio/[0-9]*",
)
# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def machine_memory(root: pathlib.Path = pathlib.Path("/")) -> int:
  """Bytes that this process may have: the machine's, its container's or job's.

  Args:
    root: of the files that tell; another one in tests.

  Raises:
    OSError, ValueError: the system does not say.
  """
  whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return min([whole, *_group_limits(root)])


def _group_limits(root: pathlib.Path) -> Iterator[int]:
  """Limits of the control groups that the process is in, of either version."""
  try:
    lines = (root / "proc/self/cgroup").read_text().splitlines()
  except OSError:
    return
  for line in lines:
    _, controllers, path = line.split(":", 2)
    if controllers == "":
      top, name = root / "sys/fs/cgroup", "memory.max"
    elif "memory" in controllers.split(","):
      top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
    else:
      continue
    # A group's limit holds for those below it. Seen from within a container
    # the path may lead nowhere, and the top is the container's own.
    group = top / path.strip("/")
    for folder in (group, *group.parents):
      with contextlib.suppress(OSError, ValueError):
        yield int((folder / name).read_text())  # "max" is none
      if folder == top:
        break
