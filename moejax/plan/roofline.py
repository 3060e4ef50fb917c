# SPDX-License-Identifier: Apache-2.0
"""How long a compiled step takes at least, by walking through it.

Each instruction takes what its arithmetic or its memory traffic takes at the
chip's rates, whichever is more, times the trips of the loops that it stands
in. Collectives are added as the schedule has them: the program waits for one,
or goes on meanwhile. Nothing else is modelled: no latency, no inefficiency of
a kernel, no overlap of instructions with each other.
"""

import collections
import dataclasses
from collections.abc import Iterator

from moejax.plan import costs, kernels
from moejax.plan.chips import Chip
from moejax.plan.collectives import Collective, Fabric
from moejax.plan.program import Computation, Instruction, Program

_ASYNC_START = "async-collective-start"
_ASYNC_DONE = "async-collective-done"
_CALLS = {"call": "to_apply", "call-start": "to_apply", "async-start": "calls"}


@dataclasses.dataclass(frozen=True)
class Work:
  """An instruction's share of a step, all its runs together."""

  op: Instruction
  runs: int
  flops: float
  bytes: float

  def seconds(self, chip: Chip) -> float:
    return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind over the same axes, in a step.

  Attributes:
    kind, axes, hidden: as a `Collective`'s.
    runs: how many there are.
    bytes: that a device sends.
    seconds: that they take, one after another.
  """

  kind: str
  axes: tuple[str, ...]
  hidden: bool
  runs: int
  bytes: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
  """A step on one device.

  Attributes:
    flops: executed, recomputation included.
    bytes: between HBM and the cores.
    compute: seconds of instructions that arithmetic bounds.
    memory: seconds of those that memory bounds.
    waits: seconds for collectives during which the program stands still.
    hidden: seconds of collectives beside which it goes on.
    traffic: the collectives, the most bytes first.
    unknown: what was left out or counted once, in words.
  """

  flops: float
  bytes: float
  compute: float
  memory: float
  waits: float
  hidden: float
  traffic: tuple[Traffic, ...]
  unknown: tuple[str, ...]

  @property
  def local(self) -> float:
    """Seconds without the network."""
    return self.compute + self.memory

  @property
  def seconds(self) -> float:
    """With it: what is hidden takes time where there is too much to hide."""
    return self.waits + max(self.local, self.hidden)


class Walk:
  """All instructions of a program as they run."""

  def __init__(self, program: Program, fabric: Fabric, rows: int):
    """`rows` reach a device's experts if all experts get as many."""
    self._program, self._fabric, self._rows = program, fabric, rows
    self.work: list[Work] = []
    self.collectives: list[tuple[int, Collective]] = []
    self.unknown: collections.Counter[str] = collections.Counter()
    self._go(program.entry, 1)

  def _go(self, name: str, runs: int) -> None:
    where = self._program.computations[name]
    for op in where.instructions.values():
      if op.opcode == "while":
        trips = self._program.trips(op, where)
        if trips is None:
          self.unknown[f"a loop of unknown length, {_short(op.scope)}"] += 1
        self._go(op.called("body"), runs * (1 if trips is None else trips))
      elif op.opcode in _CALLS:
        self._go(op.called(_CALLS[op.opcode]), runs)
      elif op.opcode == "conditional":
        self.unknown[f"a branch, {_short(op.scope)}"] += 1
      else:
        self._count(op, where, runs)

  def _count(self, op: Instruction, where: Computation, runs: int) -> None:
    if costs.is_collective(op):
      # What it reads and writes goes over the network meanwhile.
      self._collect(op, where, runs, op.opcode.endswith("-start"))
      return
    within = list(_all_within(op, self._program))
    if op.name.startswith(_ASYNC_START):
      # Carried on by the fusions that follow, beside their own work.
      for x, inner in within:
        if costs.is_collective(x):
          self._collect(x, inner, runs, True)
      return
    if op.name.startswith(_ASYNC_DONE):
      return
    known = [
      self._kernel(x, inner)
      for x, inner in [(op, where), *within]
      if x.opcode == "custom-call"
    ]
    flops = sum(f for f, _ in known)
    traffic = sum(t for _, t in known)
    if not traffic and op.opcode != "custom-call":
      flops = costs.flops(op, where, self._program)
      traffic = costs.traffic(op, where, self._program)
    if flops or traffic:
      self.work.append(Work(op, runs, flops * runs, traffic * runs))

  def _kernel(self, op: Instruction, where: Computation) -> tuple[float, float]:
    cost = kernels.cost(op, where, self._rows)
    if cost is None:
      self.unknown[f"a kernel that declares no cost, {op.name}"] += 1
    return cost or (0.0, 0.0)

  def _collect(
    self, op: Instruction, where: Computation, runs: int, hidden: bool
  ) -> None:
    shapes = [s for x in op.operands for s in where.instructions[x].shapes]
    found = self._fabric.measure(op, shapes, self._rows)
    if found:
      found = dataclasses.replace(found, hidden=hidden)
      self.collectives.append((runs, found))


def measure(program: Program, fabric: Fabric, rows: int) -> Roofline:
  """The roofline of a program.

  Args:
    program: of one device.
    fabric: the mesh that it was compiled for.
    rows: that reach a device's experts at once, if all get as many.
  """
  walk, chip = Walk(program, fabric, rows), fabric.network.chip
  by_arithmetic = lambda w: w.flops / chip.flops > w.bytes / chip.bandwidth
  total = lambda parts: sum(w.seconds(chip) for w in parts)
  sums = collections.defaultdict(lambda: [0, 0.0, 0.0])
  for runs, c in walk.collectives:
    found = sums[c.kind, c.axes, c.hidden]
    found[0] += runs
    found[1] += runs * c.bytes
    found[2] += runs * c.seconds
  traffic = [Traffic(*key, *value) for key, value in sums.items()]
  return Roofline(
    flops=sum(w.flops for w in walk.work),
    bytes=sum(w.bytes for w in walk.work),
    compute=total(w for w in walk.work if by_arithmetic(w)),
    memory=total(w for w in walk.work if not by_arithmetic(w)),
    waits=sum(t.seconds for t in traffic if not t.hidden),
    hidden=sum(t.seconds for t in traffic if t.hidden),
    traffic=tuple(sorted(traffic, key=lambda t: -t.bytes)),
    unknown=tuple(f"{n} x {what}" for what, n in walk.unknown.items()),
  )


def _all_within(
  op: Instruction, program: Program
) -> Iterator[tuple[Instruction, Computation]]:
  """What is fused into an instruction."""
  if op.opcode == "fusion":
    inner = program.computations[op.called("calls")]
    for x in inner.instructions.values():
      yield x, inner
      yield from _all_within(x, program)


def _short(scope: str) -> str:
  return scope[-60:]
