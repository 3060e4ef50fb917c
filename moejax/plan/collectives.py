# SPDX-License-Identifier: Apache-2.0
"""What a program's collectives move, over which axes of the mesh, how long."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from moejax.plan.network import Network
from moejax.plan.program import Instruction, Shape


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction, each time that it runs.

  Attributes:
    kind: as HLO names it.
    axes: of the mesh that it goes over.
    bytes: that each device sends, averaged over them.
    seconds: on an idle network.
    scope: where it comes from.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: float
  seconds: float
  scope: str


@dataclasses.dataclass(frozen=True)
class Fabric:
  """A mesh on a network.

  Attributes:
    axes: names and sizes, in the mesh's order.
    network: its devices.
  """

  axes: tuple[tuple[str, int], ...]
  network: Network

  def measure(
    self, op: Instruction, operands: Sequence[Shape], rows: int
  ) -> Collective | None:
    """A collective of this mesh; None for one among nobody.

    Args:
      op: one of `costs.COLLECTIVES`, or its `-start`.
      operands: what it is given.
      rows: that a ragged exchange sends, if all experts get as many.
    """
    kind = op.opcode.removesuffix("-start")
    group = _first_group(op.attributes, math.prod(n for _, n in self.axes))
    if kind == "collective-permute":
      group = _first_pair(op.attributes)
    if len(group) < 2:
      return None
    share = (len(group) - 1) / len(group)
    given = sum(s.bytes for s in operands)
    if kind == "all-gather":
      given *= len(group)
    elif kind == "ragged-all-to-all":
      shape = operands[0]
      given = shape.bytes * min(1.0, rows / max(shape.dims[0], 1))
    if kind in ("all-to-all", "ragged-all-to-all"):
      seconds = self.network.exchange_seconds(group, given)
      moved = given * share
    elif kind == "collective-permute":
      moved = given
      seconds = self.network.hop_seconds(group, moved)
    else:
      moved = given * share * (2 if kind == "all-reduce" else 1)
      seconds = self.network.gather_seconds(group, moved)
    return Collective(kind, self._axes_of(group), moved, seconds, op.scope)

  def _axes_of(self, group: Sequence[int]) -> tuple[str, ...]:
    """The axes along which a group's devices differ."""
    sizes = [size for _, size in self.axes]
    places = np.stack(np.unravel_index(np.asarray(group), sizes))
    varies = (places != places[:, :1]).any(1)
    return tuple(name for (name, _), v in zip(self.axes, varies) if v)


def _first_pair(attributes: str) -> list[int]:
  found = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
  return [int(x) for x in found.groups()] if found else []


def _first_group(attributes: str, devices: int) -> list[int]:
  """The devices of the first of `replica_groups`, in any of its notations."""
  found = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  if found:
    return [int(x) for x in found.group(1).split(",")]
  found = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
  )
  if found:
    shape, order, turned = (
      [int(x) for x in part.split(",")] if part else None
      for part in found.groups()
    )
    ids = np.arange(math.prod(order)).reshape(order)
    return list(ids.transpose(turned).reshape(shape)[0].tolist())
  found = re.search(
    r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes
  )
  if found:
    return _of_named_axes(*found.groups())
  return list(range(devices))  # none named: all


def _of_named_axes(sizes: str, over: str) -> list[int]:
  names = re.findall(r"'([^']+)'=(\d+)", sizes)
  over = re.findall(r"'([^']+)'", over)
  ids = np.arange(math.prod(int(n) for _, n in names))
  ids = ids.reshape([int(n) for _, n in names])
  pick = tuple(slice(None) if name in over else 0 for name, _ in names)
  return list(ids[pick].reshape(-1).tolist())
