# SPDX-License-Identifier: Apache-2.0
"""What the kernels cost that GPU programs call: each operand read once.

How often a kernel reads a matrix again, the L2 cache decides; that is left
out, so these are floors.
"""

import math
import re

from moejax.plan.program import Computation, Instruction

_CUDNN = "__cudnn$fmha"
_CUBLAS = "__cublas$"
# Products of the size of the scores: forward, and backward with them again.
_ATTENTION_PRODUCTS = {"fwd": 2, "bwd": 5}


def cost(
  op: Instruction, where: Computation, rows: int
) -> tuple[float, float] | None:
  """As `kernels.cost`, of a GPU's custom call."""
  found = re.search(r'custom_call_target="([^"]*)"', op.attributes)
  target = found.group(1) if found else ""
  arrays = [s for x in op.operands for s in where.instructions[x].shapes]
  traffic = op.hbm_bytes + sum(s.bytes for s in arrays)
  if target.startswith(_CUDNN):
    return _attention_flops(op, arrays), traffic
  if target.startswith(_CUBLAS):
    return _product_flops(op, arrays), traffic
  if target == "__gpu$xla.gpu.triton":
    return _grouped(op, arrays, rows) if "ragged_dot" in op.scope else None
  return (0.0, traffic) if target.startswith("__cub$") else None


def _attention_flops(op: Instruction, arrays) -> float:
  scores = re.search(
    r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', op.attributes
  )
  pairs = math.prod(int(x) for x in re.findall(r"\d+", scores.group(1)))
  if '"mask_type": "CAUSAL"' in op.attributes:
    pairs /= 2
  direction = "bwd" if "Backward" in op.attributes else "fwd"
  return _ATTENTION_PRODUCTS[direction] * 2 * pairs * arrays[0].dims[-1]


def _product_flops(op: Instruction, arrays) -> float:
  contracted = re.search(
    r'"lhs_contracting_dimensions": ?\[([^\]]*)\]', op.attributes
  )
  axes = [int(x) for x in re.findall(r"\d+", contracted.group(1))]
  return 2 * op.shapes[0].size * math.prod(arrays[0].dims[i] for i in axes)


def _grouped(op: Instruction, arrays, rows: int) -> tuple[float, float]:
  lhs, rhs, out = arrays[0], arrays[1], op.shapes[0]
  used = min(1.0, rows / max(lhs.dims[0], 1))
  width = rhs.dims[1] if len(out.dims) == 3 else out.dims[1]
  flops = 2 * used * lhs.size * width
  sizes = [s.bytes * (used if len(s.dims) == 2 else 1) for s in (lhs, rhs, out)]
  return flops, sum(sizes)
