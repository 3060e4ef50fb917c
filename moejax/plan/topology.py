# SPDX-License-Identifier: Apache-2.0
"""Devices of a pod that is not here, known to their compiler alone."""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator

import jax

from moejax.errors import ConfigError, UserError
from moejax.plan.chips import TPU_KINDS

EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:8x8"


def compiler_of(topology: str) -> str:
  """The package that compiles for a topology, with its version.

  Args:
    topology: `KIND:SHAPE`, such as `v5p:4x4x4`.

  Raises:
    ConfigError: there is no such kind.
    UserError: there is no compiler for it here.
  """
  kind = topology.partition(":")[0]
  if kind not in TPU_KINDS or ":" not in topology:
    raise ConfigError(
      f"--topology={topology}: use KIND:SHAPE, such as {EXAMPLES}; kinds are "
      f"{', '.join(TPU_KINDS)}"
    )
  try:
    return "libtpu " + importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    raise UserError(
      "planning for TPUs needs their compiler: pip install -c constraints.txt "
      "-e '.[plan]'"
    ) from None


def devices_of(topology: str) -> list[jax.Device]:
  """The devices of a topology.

  Raises:
    ConfigError: the compiler knows none of that name.
    As `compiler_of`.
  """
  compiler_of(topology)
  from jax.experimental import topologies

  # No chip is looked for, here or at a cloud's metadata server.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    with _quiet():
      found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
      )
  except Exception as e:  # the plugin has errors of several kinds
    reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
    raise ConfigError(
      f"--topology={topology} is not known to the compiler: {reason}; such as "
      f"{EXAMPLES}"
    ) from e
  return list(found.devices)


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
