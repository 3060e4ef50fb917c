# SPDX-License-Identifier: Apache-2.0
"""What the kernels cost that compilers cannot look into.

A Pallas kernel costs what it declares: megablox declares every row of its
buffer and the traffic of other tiles, splash attention declares nothing.
"""

import numpy as np

from moejax.ops.grouped_matmul import tpu
from moejax.plan import costs, gpu_kernels
from moejax.plan.program import Computation, Instruction

# Of a kernel of each kind, products of the size of the scores.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 5}


def cost(
  op: Instruction, where: Computation, rows: int
) -> tuple[float, float] | None:
  """FLOPs and HBM bytes of a custom call; None for one that nobody knows.

  Args:
    op: a custom call.
    where: what it stands in.
    rows: that reach a device's experts, if all of them get as many.
  """
  if 'custom_call_target="__' in op.attributes:
    return gpu_kernels.cost(op, where, rows)
  if 'custom_call_target="tpu_custom_call"' not in op.attributes:
    return 0.0, 0.0  # of the compiler itself: buffers, hints
  arrays = [where.instructions[x].shapes[0] for x in op.operands]
  matrices = [s for s in arrays if len(s.dims) >= 2 and "s32" != s.dtype]
  if "jit(gmm)" in op.scope or "jit(tgmm)" in op.scope:
    return _grouped(op, matrices, rows)
  if "splash" in op.name:
    return _splash(op, arrays)
  flops, traffic = costs.declared(op)
  return (flops, traffic) if flops or traffic else None


def _grouped(op, matrices, rows: int) -> tuple[float, float]:
  out, dtype = op.shapes[0], np.dtype(_NUMPY[matrices[0].dtype])
  groups_are_out = "jit(tgmm)" in op.scope
  groups = out.dims[0] if groups_are_out else matrices[1].dims[0]
  m, k = matrices[0].dims
  if groups_are_out:
    m, k = (m, k) if m == matrices[1].dims[0] else (k, m)
  n = matrices[1].dims[1] if groups_are_out else out.dims[1]
  return tpu.cost(min(m, rows), k, n, groups, dtype, groups_are_out)


def _splash(op, arrays) -> tuple[float, float]:
  """Causal: half of all pairs of tokens. It also runs over batch and heads.

  Where each device has a part of the queries, that of the last one.
  """
  q, k = [s for s in arrays if len(s.dims) >= 3 and s.dtype in _NUMPY][:2]
  T, H = q.dims[-2:]
  pairs = T * (k.dims[-2] - T / 2)
  kind = next((k for k in ("dkv", "dq") if f"_{k}" in op.name), "fwd")
  flops = _SPLASH_PRODUCTS[kind] * 2 * (q.size // (T * H)) * pairs * H
  traffic = op.hbm_bytes + sum(s.bytes for s in arrays if not s.on_chip)
  return flops, traffic


_NUMPY = {"bf16": "bfloat16", "f32": "float32", "f16": "float16"}
