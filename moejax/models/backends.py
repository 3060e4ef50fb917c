# SPDX-License-Identifier: Apache-2.0
"""How the same maths is computed here: chosen once, by platform and mesh."""

import dataclasses
from collections.abc import Callable

import jax

from moejax.models.placement import OneDevice

Array = jax.Array
Dispatch = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class Backends:
  """What a config's names stand for.

  Attributes:
    platform: cpu, gpu or tpu.
    dispatch: moves tokens to experts.
    matmul: name of the grouped matmul back end.
    attention: name of the attention back end, or auto: by the row length.
    placement: how arrays are split over devices.
  """

  platform: str
  dispatch: Dispatch
  matmul: str
  attention: str
  placement: OneDevice = OneDevice()
