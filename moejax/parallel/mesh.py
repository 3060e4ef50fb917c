# SPDX-License-Identifier: Apache-2.0
"""The mesh of a run."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from moejax.config import ParallelConfig
from moejax.errors import ConfigError

AXES = ParallelConfig.AXES


def make_mesh(
  config: ParallelConfig, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """A mesh of all devices, its axes in the order of `ParallelConfig.AXES`.

  The last axes are those of most traffic, and lie on neighbouring devices.

  Args:
    config: sizes of the axes.
    devices: None takes all of this run. A run on one device may leave others
      alone.

  Raises:
    ConfigError: their number is not the product of the sizes.
  """
  shape = tuple(getattr(config, axis) for axis in AXES)
  if devices is None:
    devices = jax.devices()
    if math.prod(shape) == 1 and jax.process_count() == 1:
      devices = devices[:1]
  devices = list(devices)
  if math.prod(shape) != len(devices):
    raise ConfigError(_mismatch(config, len(devices)))
  # On a torus an axis may be a part of one of its sides: 8 on 4 x 4 x 4.
  placed = mesh_utils.create_device_mesh(
    shape, devices, allow_split_physical_axes=True
  )
  return jax.sharding.Mesh(placed, AXES)


def _mismatch(config: ParallelConfig, num_devices: int) -> str:
  sizes = " * ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
  rest = config.num_devices // config.data
  fix = f"other sizes, with a product of {num_devices}"
  if num_devices % rest == 0:
    fix = f"--config.parallel.data={num_devices // rest}"
  return (
    f"parallel: {sizes} is a mesh of {config.num_devices} devices, there are "
    f"{num_devices}; use {fix}"
  )
