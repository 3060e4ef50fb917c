# SPDX-License-Identifier: Apache-2.0
"""What the chips of a pod can do, and how they are connected."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """Rates of one chip.

  Attributes:
    name: in topologies' names.
    peak: dense bf16 FLOP/s by the data sheet; what MFU refers to.
    flops, bandwidth: FLOP/s and bytes/s of its memory that XLA's own model of
      the chip reckons with; of the data sheet where XLA says nothing.
    memory: bytes that programs may use, as the compiler says; 0 if unknown.
    link: bytes/s of one link, one way.
    wraps: a side of the torus of a multiple of this closes to a ring.
  """

  name: str
  peak: float
  flops: float
  bandwidth: float
  memory: int
  link: float
  wraps: int


_GIB = 2**30
# Peaks and memory rates: Google Cloud's pages of each version; `flops` and
# `bandwidth` of v5p and v6e: found from `optimal_seconds` of single products;
# links: "How to Scale Your Model" (jax-ml.github.io/scaling-book), v7 by its
# data sheet in the same proportion.
CHIPS = {
  "TPU v4": Chip("v4", 275e12, 275e12, 1.23e12, 0, 45e9, 4),
  "TPU v5 lite": Chip(
    "v5e", 197e12, 197e12, 0.82e12, int(15.75 * _GIB), 45e9, 16
  ),
  "TPU v5": Chip(
    "v5p", 459e12, 394e12, 2.35e12, int(95.74 * _GIB), 90e9, 4
  ),
  "TPU v6 lite": Chip(
    "v6e", 918e12, 918e12, 1.64e12, int(31.25 * _GIB), 90e9, 16
  ),
  "TPU7x": Chip("tpu7x", 2307e12, 2307e12, 7.38e12, 0, 180e9, 4),
}  # fmt: skip
TPU_KINDS = tuple(chip.name for chip in CHIPS.values())


@dataclasses.dataclass(frozen=True)
class Network:
  """The torus of a topology, and its devices in a mesh's order.

  Attributes:
    chip: all are of this kind.
    coords: of each device, in the order of the mesh.
    sides: of the torus.
    cores: devices of a chip.
  """

  chip: Chip
  coords: tuple[tuple[int, ...], ...]
  sides: tuple[int, ...]
  cores: int

  @classmethod
  def of(cls, devices: Sequence[Any]) -> "Network":
    """Of the devices of a mesh, flattened."""
    coords = tuple(tuple(d.coords) for d in devices)
    sides = tuple(max(side) + 1 for side in zip(*coords))
    cores = len(devices) // len(set(coords))
    return cls(CHIPS[devices[0].device_kind], coords, sides, cores)

  def gather_seconds(self, group: Sequence[int], size: float) -> float:
    """Until each device of a group has `size` bytes of the others.

    Rings along each side of the torus that the group spans, in both
    directions where the side closes.
    """
    ways = sum(
      2 if self._closes(side, extent) else 1
      for side, extent in self._extents(group)
    )
    return size / (self.chip.link * max(ways, 1))

  def exchange_seconds(self, group: Sequence[int], size: float) -> float:
    """Until each device of a group has sent `size` bytes, evenly to all.

    What passes the middle of each side decides: half of all.
    """
    slowest = 0.0
    for side, extent in self._extents(group):
      links = 2 if self._closes(side, extent) else 1
      slowest = max(slowest, size * extent / (4 * links * self.chip.link))
    return slowest

  def _extents(self, group: Sequence[int]) -> list[tuple[int, int]]:
    """(side, how many places of it) that a group spans."""
    spans = [len(set(x)) for x in zip(*(self.coords[i] for i in group))]
    return [(side, n) for side, n in enumerate(spans) if n > 1]

  def _closes(self, side: int, extent: int) -> bool:
    whole = self.sides[side]
    return extent == whole and whole % self.chip.wraps == 0 and whole > 2

  @property
  def num_chips(self) -> int:
    return math.prod(self.sides)
