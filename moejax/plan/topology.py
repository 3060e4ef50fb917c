# SPDX-License-Identifier: Apache-2.0
"""Devices of a pod that is not here, known to their compiler alone."""

import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator

import jax

from moejax.errors import ConfigError, UserError
from moejax.plan.chips import GPU_KINDS, TPU_KINDS
from moejax.plan.gpu_targets import target_config

EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:8x8, h100:8x8"
_GPU_COMPILERS = ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
_EXTRAS = {
  "tpu": ("TPUs", "plan", ""),
  "gpu": ("GPUs", "plan-gpu", " (Python 3.11: its pins have the jax for it)"),
}
_NODES = re.compile(r"[1-9]\d*x[1-8]")


def compiler_of(topology: str) -> str:
  """The package that compiles for a topology, with its version.

  Args:
    topology: `KIND:SHAPE`: a torus of TPUs such as `v5p:4x4x4`, or nodes by
      GPUs of a node such as `h100:8x8`.

  Raises:
    ConfigError: there is no such kind.
    UserError: there is no compiler for it here.
  """
  kind = _kind(topology)
  packages = _GPU_COMPILERS if kind in GPU_KINDS else ("libtpu",)
  for package in packages:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      return f"{package} {importlib.metadata.version(package)}"
  what, extra, where = _EXTRAS["gpu" if kind in GPU_KINDS else "tpu"]
  raise UserError(
    f"planning for {what} needs their compiler: pip install -c "
    f"constraints.txt -e '.[{extra}]'{where}"
  )


def platform_of(topology: str) -> str:
  """tpu or gpu."""
  return "gpu" if _kind(topology) in GPU_KINDS else "tpu"


def devices_of(topology: str) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    ConfigError: the compiler knows none of that name.
    As `compiler_of`.
  """
  compiler_of(topology)
  from jax.experimental import topologies

  # No chip is looked for, here or at a cloud's metadata server; no library
  # that only runs programs is asked for.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  kind = _kind(topology)
  try:
    with _quiet():
      if kind in GPU_KINDS:
        nodes, each = topology.partition(":")[2].split("x")
        found = topologies.get_topology_desc(
          platform="cuda", topology_name=kind, topology=f"{nodes}x1x{each}",
          target_config=target_config(kind),
        )  # fmt: skip
      else:
        found = topologies.get_topology_desc(
          platform="tpu", topology_name=topology
        )
  except Exception as e:  # the plugins have errors of several kinds
    reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
    raise ConfigError(
      f"--topology={topology} is not known to the compiler: {reason}; such as "
      f"{EXAMPLES}"
    ) from e
  return list(found.devices)


def _kind(topology: str) -> str:
  kind, _, shape = topology.partition(":")
  known = kind in TPU_KINDS and shape
  if not (known or (kind in GPU_KINDS and _NODES.fullmatch(shape))):
    raise ConfigError(
      f"--topology={topology}: use KIND:SHAPE, such as {EXAMPLES} (8 nodes of "
      f"8); kinds are {', '.join(TPU_KINDS + GPU_KINDS)}"
    )
  return kind


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what libtpu prints of the chips that it does not find."""
  sys.stderr.flush()
  kept = os.dup(2)
  silent = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(silent, 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(silent)
    os.close(kept)
