# SPDX-License-Identifier: Apache-2.0
"""How the same maths is computed here: chosen once, by platform and mesh."""

import dataclasses
from collections.abc import Callable

import jax

from moejax.models.placement import OneDevice
from moejax.routing.base import Router

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
    router: the function that the config's router is now. A notebook may define
      it anew, and models that differ in it are not equal: no program of one is
      taken for the other.
  """

  platform: str
  dispatch: Dispatch
  matmul: str
  attention: str
  placement: OneDevice = OneDevice()
  router: Router | None = None
