# SPDX-License-Identifier: Apache-2.0
"""How long a compiled step takes at least, by walking through it.

Each instruction takes what its arithmetic or its memory traffic takes at the
chip's rates, whichever is more, times the trips of the loops that it stands
in. Collectives take the network one after another; where the schedule lets
the program go on, it waits only for what is then left. Nothing else is
modelled: no latency, no inefficiency of a kernel, no overlap of instructions
with each other.
"""

import collections
import copy
import dataclasses
from collections.abc import Iterator

from moejax.plan import costs, kernels
from moejax.plan.clock import Clock, Sent
from moejax.plan.collectives import Fabric
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

  def seconds(self, rates: tuple[float, float]) -> float:
    """At a device's FLOP/s and bytes/s."""
    return max(self.flops / rates[0], self.bytes / rates[1])


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind over the same axes, in a step.

  Attributes:
    kind, axes: as a `Collective`'s.
    runs: how many there are.
    bytes: that a device sends.
    seconds: that they take, one after another.
    waits: of these, how long the program stands still.
  """

  kind: str
  axes: tuple[str, ...]
  runs: int
  bytes: float
  seconds: float
  waits: float


@dataclasses.dataclass(frozen=True)
class Roofline:
  """A step on one device.

  Attributes:
    flops: executed, recomputation included.
    bytes: between HBM and the cores.
    compute: seconds of instructions that arithmetic bounds.
    memory: seconds of those that memory bounds.
    waits: seconds that the program stands still for collectives.
    hidden: seconds of collectives beside which it goes on.
    traffic: the collectives, the most bytes first.
    unknown: what was left out, or counted by a guess, in words.
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
    return self.local + self.waits


class Walk:
  """All instructions of a program as they run."""

  def __init__(self, program: Program, fabric: Fabric, rows: int):
    """`rows` reach a device's experts if all experts get as many."""
    self._program, self._fabric, self._rows = program, fabric, rows
    self.work: list[Work] = []
    self.collectives: list[Sent] = []
    self.unknown: collections.Counter[str] = collections.Counter()
    self._go(program.entry, 1)

  def _go(self, name: str, runs: int) -> float:
    """Seconds of one run of a computation."""
    where, clock = self._program.computations[name], Clock()
    for op in where.instructions.values():
      if op.opcode == "while":
        trips = self._program.trips(op, where)
        if trips is None:
          self.unknown[f"a loop of unknown length, {_short(op.scope)}"] += 1
        trips = 1 if trips is None else trips
        if trips:
          clock.now += trips * self._go(op.called("body"), runs * trips)
      elif sending := list(self._sending(op, where)):
        # What it reads and writes goes over the network meanwhile.
        for x, inner in sending:
          self._collect(x, inner, runs, clock, op.name)
        if not _goes_on(op):
          clock.wait(op.name)
      elif op.opcode.endswith("-done") or op.name.startswith(_ASYNC_DONE):
        clock.wait(_begun_by(op, where))
      elif op.opcode in _CALLS:
        clock.now += self._go(op.called(_CALLS[op.opcode]), runs)
      elif op.opcode == "conditional":
        clock.now += self._go(self._longest_branch(op), runs)
      else:
        clock.now += self._count(op, where, runs) / runs
    return clock.end()

  def _longest_branch(self, op: Instruction) -> str:
    """How often each is taken, the program does not tell."""
    what = f"a branch, counted as its longest side, {_short(op.scope)}"
    self.unknown[what] += 1

    def seconds(name: str) -> float:
      apart = copy.copy(self)
      apart.work, apart.collectives = [], []
      apart.unknown = collections.Counter()
      return apart._go(name, 1)

    return max(op.branches, key=seconds)

  def _sending(
    self, op: Instruction, where: Computation
  ) -> Iterator[tuple[Instruction, Computation]]:
    """The collectives that an instruction is, or begins."""
    if costs.is_collective(op):
      yield op, where
    elif op.name.startswith(_ASYNC_START):
      # Carried on by the fusions that follow, beside their own work.
      within = _all_within(op, self._program)
      yield from (x for x in within if costs.is_collective(x[0]))
    elif _is_scatter(op):
      for x, inner in _all_within(op, self._program):
        if x.opcode == "all-reduce":  # of which each device keeps its part
          yield dataclasses.replace(x, opcode="reduce-scatter"), inner
    elif op.opcode == "async-start":
      inner = self._program.computations[op.called("calls")]
      for x in inner.instructions.values():
        if costs.is_collective(x):
          yield x, inner

  def _count(self, op: Instruction, where: Computation, runs: int) -> float:
    """Notes its work; returns the seconds of all runs."""
    within = list(_all_within(op, self._program))
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
    work = Work(op, runs, flops * runs, traffic * runs)
    if flops or traffic:
      self.work.append(work)
    return work.seconds(self._fabric.network.rates)

  def _kernel(self, op: Instruction, where: Computation) -> tuple[float, float]:
    cost = kernels.cost(op, where, self._rows)
    if cost is None:
      self.unknown[f"a kernel that declares no cost, {op.name}"] += 1
    return cost or (0.0, 0.0)

  def _collect(
    self, op: Instruction, where: Computation, runs: int, clock: Clock,
    name: str,
  ) -> None:  # fmt: skip
    shapes = [s for x in op.operands for s in where.instructions[x].shapes]
    found = self._fabric.measure(op, shapes, self._rows)
    if found:
      self.collectives.append(clock.send(name, found, runs))


def measure(program: Program, fabric: Fabric, rows: int) -> Roofline:
  """The roofline of a program.

  Args:
    program: of one device.
    fabric: the mesh that it was compiled for.
    rows: that reach a device's experts at once, if all get as many.
  """
  walk, rates = Walk(program, fabric, rows), fabric.network.rates
  by_arithmetic = lambda w: w.flops / rates[0] > w.bytes / rates[1]
  total = lambda parts: sum(w.seconds(rates) for w in parts)
  sums = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])
  for sent in walk.collectives:
    runs, c = sent.runs, sent.collective
    found = sums[c.kind, c.axes]
    found[0] += runs
    found[1] += runs * c.bytes
    found[2] += runs * c.seconds
    found[3] += sent.waits
  traffic = [Traffic(*key, *value) for key, value in sums.items()]
  return Roofline(
    flops=sum(w.flops for w in walk.work),
    bytes=sum(w.bytes for w in walk.work),
    compute=total(w for w in walk.work if by_arithmetic(w)),
    memory=total(w for w in walk.work if not by_arithmetic(w)),
    waits=sum(t.waits for t in traffic),
    hidden=sum(t.seconds - t.waits for t in traffic),
    traffic=tuple(sorted(traffic, key=lambda t: -t.bytes)),
    unknown=tuple(f"{n} x {what}" for what, n in walk.unknown.items()),
  )


def _is_scatter(op: Instruction) -> bool:
  """A reduce-scatter as the TPU's compiler writes those that block."""
  name = op.called("calls") if op.opcode == "fusion" else None
  return name is not None and name.startswith("all-reduce-scatter")


def _goes_on(op: Instruction) -> bool:
  """Whether the program goes on while it runs."""
  begins = op.opcode.endswith("-start") or op.name.startswith(_ASYNC_START)
  return begins and '"is_sync":true' not in op.attributes


def _begun_by(op: Instruction, where: Computation) -> str:
  """The name of the instruction that began what another ends."""
  if op.name.startswith(_ASYNC_DONE):
    return op.name.replace(_ASYNC_DONE, _ASYNC_START)
  while op.opcode.endswith(("-done", "-update")):
    op = where.instructions[op.operands[0]]
  return op.name


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
