# SPDX-License-Identifier: Apache-2.0
"""A compiled program's text (scheduled HLO) as instructions."""

import dataclasses
import functools
import math
import re
from typing import Self

_BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
  "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64,
  "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array.

  Attributes:
    dtype: as HLO names it.
    dims: sizes.
    on_chip: lies in the core's own memory, so that it is no HBM traffic.
  """

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> float:
    return self.size * _BITS[self.dtype] / 8 if self.dtype in _BITS else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `name = shapes opcode(operands), attributes`."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  inside: str
  attributes: str
  is_root: bool

  def called(self, key: str) -> str | None:
    """The computation that an attribute such as `body` names."""
    found = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
    return found.group(1) if found else None

  @property
  def branches(self) -> list[str]:
    """The computations of a conditional."""
    found = re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
    if found:
      return re.findall(r"%([\w.\-]+)", found.group(1))
    named = self.called("true_computation"), self.called("false_computation")
    return [name for name in named if name]

  @functools.cached_property
  def scope(self) -> str:
    """Where in the traced program it came from."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found.group(1) if found else ""

  @property
  def hbm_bytes(self) -> float:
    """Of the results, without what stays on the chip."""
    return sum(s.bytes for s in self.shapes if not s.on_chip)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name, in the order in which they run."""

  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    return next(i for i in self.instructions.values() if i.is_root)

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    users = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return users

  def parameter(self, index: int) -> Instruction:
    return next(
      i for i in self.instructions.values()
      if i.opcode == "parameter" and i.inside == str(index)
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
  """All computations of a module."""

  computations: dict[str, Computation]
  entry: str

  @classmethod
  def parse(cls, text: str) -> Self:
    """From `compiled.as_text()`."""
    computations, entry, lines = {}, None, None
    for line in text.splitlines():
      if head := _HEAD.match(line):
        lines = {}
        computations[head.group(1)] = Computation(lines)
        entry = head.group(1) if line.startswith("ENTRY") else entry
      elif (found := _LINE.match(line)) and lines is not None:
        instruction = _instruction(found, line)
        lines[instruction.name] = instruction
    return cls(computations, entry)

  def trips(self, loop: Instruction, where: Computation) -> int | None:
    """How often a while loop runs; None where the text does not say.

    The loops of `lax.scan` and `fori_loop` count up by one to a constant.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
      return int(known.group(1))
    condition = self.computations[loop.called("condition")]
    test = condition.root
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
      return None
    counter, bound = (condition.instructions[x] for x in test.operands)
    if bound.opcode != "constant" or counter.opcode != "get-tuple-element":
      return None
    start = _start(loop, counter, where)
    return None if start is None else int(bound.inside) - start

  def stacked_bytes(self, loop: Instruction) -> float:
    """Of the arrays that a loop fills slice by slice, as `scan` stacks."""
    body = self.computations[loop.called("body")]
    results = [body.instructions[x] for x in body.root.operands]
    return sum(
      shape.bytes
      for shape, result in zip(loop.shapes, results)
      if self._fills(result, body)
    )

  def _fills(self, op: Instruction, where: Computation) -> bool:
    """Whether it is its operand with a slice exchanged."""
    while op.opcode in ("bitcast", "copy", "get-tuple-element", "copy-done"):
      if op.opcode == "get-tuple-element":
        source = where.instructions[op.operands[0]]
        if source.opcode != "fusion":
          return False
        inner = self.computations[source.called("calls")]
        index = int(re.search(r"index=(\d+)", op.attributes).group(1))
        return self._fills(
          inner.instructions[inner.root.operands[index]], inner
        )
      op = where.instructions[op.operands[0]]
      if op.opcode == "copy-start":
        op = where.instructions[op.operands[0]]
    if op.opcode == "fusion":
      inner = self.computations[op.called("calls")]
      return self._fills(inner.root, inner)
    return op.opcode == "dynamic-update-slice"


def _start(loop, counter, where: Computation) -> int | None:
  """The counter's first value; None if it is not a constant."""
  index = int(re.search(r"index=(\d+)", counter.attributes).group(1))
  initial = where.instructions[loop.operands[0]]
  if initial.opcode != "tuple":
    return None
  first = where.instructions[initial.operands[index]]
  while first.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
    first = where.instructions[first.operands[0]]
  return int(first.inside) if first.opcode == "constant" else None


def _instruction(found: re.Match, line: str) -> Instruction:
  is_root, name = found.groups()
  rest = line[found.end() :]
  end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
  opcode = _OPCODE.match(rest, end)
  close = _closing(rest, opcode.end() - 1)
  inside = rest[opcode.end() : close]
  return Instruction(
    name=name,
    opcode=opcode.group(1),
    shapes=shapes(rest[:end]),
    operands=tuple(_NAME.findall(inside)),
    inside=inside,
    attributes=rest[close + 1 :],
    is_root=bool(is_root),
  )


def shapes(text: str) -> tuple[Shape, ...]:
  """All arrays of a type, which may be a tuple of tuples."""
  return tuple(
    Shape(
      dtype,
      tuple(int(x) for x in dims.split(",") if x),
      "S(1)" in (layout or ""),
    )
    for dtype, dims, layout in _ARRAY.findall(text)
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  raise ValueError(f"no end of {text[start : start + 50]!r}")
