# SPDX-License-Identifier: Apache-2.0
"""How long a pod's network takes, if nothing else uses it."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from moejax.plan.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Torus:
  """TPUs in a torus.

  Attributes:
    chip: all are of this kind.
    coords: of each device, in the order of the mesh, flattened.
    sides: of the torus.
    cores: devices of a chip.
  """

  chip: Chip
  coords: tuple[tuple[int, ...], ...]
  sides: tuple[int, ...]
  cores: int

  def gather_seconds(self, group: Sequence[int], size: float) -> float:
    """Until each device of a group has `size` bytes of the others.

    Rings along each side of the torus that the group spans, in both
    directions where the side closes.
    """
    ways = sum(
      2 if self._closes(side, extent) else 1
      for side, extent in self._extents(group)
    )
    return size * self._sharing(group) / (self.chip.link * max(ways, 1))

  def exchange_seconds(self, group: Sequence[int], size: float) -> float:
    """Until each device of a group has sent `size` bytes, evenly to all.

    What passes the middle of each side decides: half of all.
    """
    slowest = 0.0
    size *= self.cores  # a chip's devices share its links
    for side, extent in self._extents(group):
      links = 2 if self._closes(side, extent) else 1
      slowest = max(slowest, size * extent / (4 * links * self.chip.link))
    return slowest

  def hop_seconds(self, group: Sequence[int], size: float) -> float:
    """Until a device has sent `size` bytes to a neighbour."""
    return size * self._sharing(group) / self.chip.link

  @property
  def rates(self) -> tuple[float, float]:
    """FLOP/s, and bytes/s of memory, of a device."""
    return self.chip.flops / self.cores, self.chip.bandwidth / self.cores

  def _sharing(self, group: Sequence[int]) -> float:
    """Groups that send over the same links at once: a chip's other devices'."""
    places = {self.coords[i] for i in group}
    return self.cores * len(places) / len(group)

  def _extents(self, group: Sequence[int]) -> list[tuple[int, int]]:
    """(side, how many places of it) that a group spans."""
    spans = [len(set(x)) for x in zip(*(self.coords[i] for i in group))]
    return [(side, n) for side, n in enumerate(spans) if n > 1]

  def _closes(self, side: int, extent: int) -> bool:
    """Whether a side is a ring.

    Of the kinds with three dimensions the optical switches close whole cubes of
    4 x 4 x 4 only: 2x4x4 has no ring at all. Those of two have a third side of
    one place.
    """
    whole = self.sides[side]
    cubes = self.sides if self.chip.wraps == 4 else [whole]
    even = all(x % self.chip.wraps == 0 for x in cubes)
    return extent == whole and even and whole > 2

  @property
  def num_chips(self) -> int:
    return math.prod(self.sides)


@dataclasses.dataclass(frozen=True)
class Nodes:
  """GPUs in nodes: NVLink within, a network card for each GPU between.

  Attributes:
    chip: all are of this kind.
    nodes: of each device, in the order of the mesh, flattened.
  """

  chip: Chip
  nodes: tuple[int, ...]
  cores = 1

  @property
  def rates(self) -> tuple[float, float]:
    """FLOP/s, and bytes/s of memory, of a device."""
    return self.chip.flops, self.chip.bandwidth

  def gather_seconds(self, group: Sequence[int], size: float) -> float:
    """Until each device of a group has `size` bytes of the others.

    Rings through all nodes, as many as a node has devices of the group; each
    enters a node by another card.
    """
    each = self._each(group)
    if len(each) == 1:
      return size / self.chip.link
    return size / min(self.chip.link, min(each.values()) * self.chip.nic)

  def exchange_seconds(self, group: Sequence[int], size: float) -> float:
    """Until each device of a group has sent `size` bytes, evenly to all."""
    near = min(self._each(group).values())
    within = size * (near - 1) / len(group) / self.chip.link
    return max(within, size * (1 - near / len(group)) / self.chip.nic)

  def hop_seconds(self, group: Sequence[int], size: float) -> float:
    """Until a device has sent `size` bytes to another."""
    near = len(self._each(group)) == 1
    return size / (self.chip.link if near else self.chip.nic)

  def _each(self, group: Sequence[int]) -> collections.Counter[int]:
    """How many devices of a group a node has."""
    return collections.Counter(self.nodes[i] for i in group)

  @property
  def num_chips(self) -> int:
    return len(self.nodes)


Network = Torus | Nodes


def network_of(devices: Sequence[Any]) -> Network:
  """The network of the devices of a mesh, flattened."""
  chip = CHIPS[devices[0].device_kind]
  if chip.nic:
    return Nodes(chip, tuple(d.process_index for d in devices))
  coords = tuple(tuple(d.coords) for d in devices)
  sides = tuple(max(side) + 1 for side in zip(*coords))
  return Torus(chip, coords, sides, len(devices) // len(set(coords)))
