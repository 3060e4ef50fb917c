# SPDX-License-Identifier: Apache-2.0
"""Arithmetic and memory traffic of an instruction."""

import json
import math
import re

import numpy as np

from moejax.plan.program import Computation, Instruction, Program, Shape

# No work of their own: names for memory, or waiting for what was counted where
# it began.
FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast after-all partition-id "
  "replica-id copy-done call-done async-done async-update opt-barrier "
  "optimization-barrier domain add-dependency send-done recv-done "
  "all-reduce-done all-gather-done collective-permute-done "
  "ragged-all-to-all-done reduce-scatter-done".split()
)
COLLECTIVES = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)
_SLICES = ("dynamic-slice", "slice", "gather")


def flops(op: Instruction, where: Computation, program: Program) -> float:
  """Of matrix products; all else is bound by memory."""
  if op.opcode == "fusion":
    inner = program.computations[op.called("calls")]
    return sum(flops(x, inner, program) for x in inner.instructions.values())
  operand = lambda i: where.instructions[op.operands[i]].shapes[0]
  if op.opcode == "dot":
    return _dot_flops(op, operand(0))
  if op.opcode == "convolution":
    return _convolution_flops(op, operand(0), operand(1))
  return 0


def traffic(op: Instruction, where: Computation, program: Program) -> float:
  """Bytes between HBM and the cores: read once, written once."""
  if op.opcode in FREE:
    return 0
  operands = [where.instructions[x] for x in op.operands]
  if op.opcode == "fusion":
    return _fusion_traffic(op, operands, program)
  if op.opcode in ("copy-start", "slice-start"):  # one way
    sides = [s.bytes for s in op.shapes[:2] if not s.on_chip]
    return sum(sides)
  if op.opcode in _SLICES:
    return op.hbm_bytes + _hbm(operands[0], op.shapes[0].bytes)
  if op.opcode in ("dynamic-update-slice", "scatter"):
    part = operands[1 if op.opcode != "scatter" else 2]
    return part.hbm_bytes + _hbm(op, part.shapes[0].bytes)
  if op.opcode in ("broadcast", "iota"):
    return op.hbm_bytes
  return op.hbm_bytes + sum(x.hbm_bytes for x in operands)


def is_collective(op: Instruction) -> bool:
  """Whether it, or its beginning, is one of `COLLECTIVES`."""
  return op.opcode.removesuffix("-start") in COLLECTIVES


def declared(op: Instruction) -> tuple[float, float]:
  """FLOPs and bytes that a kernel says of itself."""
  found = re.search(r'"cost_estimate":(\{[^}]*\})', op.attributes)
  if not found:
    return 0, 0
  said = json.loads(found.group(1))
  return float(said["flops"]), float(said["bytes_accessed"])


def _hbm(op: Instruction, size: float) -> float:
  return 0 if op.shapes[0].on_chip else size


def _fusion_traffic(
  op: Instruction, operands: list[Instruction], program: Program
) -> float:
  inner = program.computations[op.called("calls")]
  total = 0.0
  for index, operand in enumerate(operands):
    if not operand.shapes or operand.shapes[0].on_chip:
      continue
    total += _read(inner.parameter(index), inner, program)
  roots = [inner.root]
  if inner.root.opcode == "tuple":
    roots = [inner.instructions[x] for x in inner.root.operands]
  for shape, root in zip(op.shapes, roots):
    if not shape.on_chip:
      total += _written(root, inner, program)
  return total


def _read(param: Instruction, inner: Computation, program: Program) -> float:
  """Bytes of a fusion's operand that it reads: slices, if only those."""
  whole, total = param.shapes[0].bytes, 0.0
  for user in inner.users[param.name]:
    if user.opcode in _SLICES and user.operands[0] == param.name:
      total += user.shapes[0].bytes
    elif (
      user.opcode == "dynamic-update-slice" and user.operands[0] == param.name
    ):
      continue  # updated in place
    elif user.opcode == "tuple" or is_collective(user):
      continue  # handed through; what goes over the network is counted there
    elif user.opcode == "bitcast":
      total += _read(user, inner, program)
    elif user.opcode == "fusion":
      called = program.computations[user.called("calls")]
      for index, name in enumerate(user.operands):
        if name == param.name:
          total += _read(called.parameter(index), called, program)
    else:
      return whole
  return min(whole, total)


def _written(root: Instruction, inner: Computation, program: Program) -> float:
  """Bytes of a fusion's result that it writes: a slice, if in place."""
  while root.opcode in ("bitcast", "get-tuple-element"):
    root = inner.instructions[root.operands[0]]
  if root.opcode == "parameter" or is_collective(root):
    return 0
  if root.opcode == "dynamic-update-slice":
    return inner.instructions[root.operands[1]].shapes[0].bytes
  if root.opcode == "fusion":
    called = program.computations[root.called("calls")]
    if called.root.opcode != "tuple":
      return _written(called.root, called, program)
  return sum(s.bytes for s in root.shapes)


def _dot_flops(op: Instruction, lhs: Shape) -> float:
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
  dims = [int(x) for x in contracted.group(1).split(",") if x]
  return 2 * op.shapes[0].size * math.prod(lhs.dims[i] for i in dims)


def _convolution_flops(op: Instruction, lhs: Shape, rhs: Shape) -> float:
  """The TPU compiler writes products as convolutions.

  Spatial axes count where the window meets the input, not where it meets
  padding: that is how batched and split axes are written.
  """
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
  of_lhs, of_rhs, of_out = labels.groups()
  out = op.shapes[0]
  total = 2.0 * out.dims[of_out.index("b")] * out.dims[of_out.index("f")]
  total *= rhs.dims[of_rhs.index("i")]
  # `i` of the kernel is that of one group; batch groups split the batch.
  groups = re.search(r"batch_group_count=(\d+)", op.attributes)
  if groups:
    total *= lhs.dims[of_lhs.index("b")] / int(groups.group(1))
    total /= out.dims[of_out.index("b")]
  for axis in sorted(set(of_out) - {"b", "f"}):
    total *= _meets(
      op, int(axis), lhs.dims[of_lhs.index(axis)],
      rhs.dims[of_rhs.index(axis)], out.dims[of_out.index(axis)],
    )  # fmt: skip
  return total


def _meets(op: Instruction, axis: int, size: int, window: int, out: int) -> int:
  """Pairs of an output and a window place that lie on an input element."""
  given = re.search(r"window=\{([^}]*)\}", op.attributes)
  field = dict(x.split("=") for x in given.group(1).split()) if given else {}

  def of_axis(key: str, otherwise: str) -> str:
    return field[key].split("x")[axis] if key in field else otherwise

  low = int(of_axis("pad", "0_0").split("_")[0])
  stride = int(of_axis("stride", "1"))
  inner, outer = (
    int(of_axis("lhs_dilate", "1")),
    int(of_axis("rhs_dilate", "1")),
  )
  at = np.arange(out)[:, None] * stride + np.arange(window)[None] * outer - low
  inside = (at >= 0) & (at <= (size - 1) * inner) & (at % inner == 0)
  return int(inside.sum())
