# SPDX-License-Identifier: Apache-2.0
"""What XLA:TPU's compiler says of the grouped matmul, without a TPU.

  pip install libtpu
  python benchmarks/grouped_matmul_tpu_compile.py [v5e:2x2 v5p:2x2x1 v6e:2x2]

One OLMoE-1B-7B expert product, forward and forward + backward. `optimal` is the
compiler's sum of rooflines (less the -1 s that some versions put for each
operation they cannot judge). In it a Pallas kernel costs what it declares, and
megablox declares a weight tile for every visit of a tile of rows, though one
with all of k stays in VMEM, and nothing for the arithmetic that partly filled
tiles waste. `model` counts both; `choose_tiles` chose by it. Compare
`--tiles 512,1024,1024`.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from moejax.ops.grouped_matmul import (
  grouped_matmul,
  tpu,
)

ROWS, D, F, EXPERTS = 32768, 2048, 1024, 64
DTYPE = jnp.bfloat16


def forward(x_AD, w_EDF, sizes_E):
  return grouped_matmul(x_AD, w_EDF, sizes_E, backend="tpu")


def both(x_AD, w_EDF, sizes_E, dy_AF):
  y_AF, vjp = jax.vjp(lambda x, w: forward(x, w, sizes_E), x_AD, w_EDF)
  return y_AF, *vjp(dy_AF)


def compile_for(topology: str) -> None:
  device = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices[0]
  shape = lambda dims, dtype=DTYPE: jax.ShapeDtypeStruct(
    dims, dtype, sharding=SingleDeviceSharding(device)
  )
  arguments = (
    shape((ROWS, D)),
    shape((EXPERTS, D, F)),
    shape((EXPERTS,), jnp.int32),
    shape((ROWS, F)),
  )
  for name, function, count in ("forward", forward, 3), ("both", both, 4):
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments[:count]).compile()
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(
      f"{topology:11} {name:8} optimal "
      f"{cost['optimal_seconds'] % 1 * 1e3:6.3f} ms, temporaries "
      f"{temporary:5.0f} MiB, compiled in "
      f"{time.perf_counter() - start:.0f} s",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "topologies", nargs="*", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
  )
  parser.add_argument("--tiles", help="m,k,n for all three products")
  args = parser.parse_args()
  if args.tiles:
    fixed = tpu.Tiles(*map(int, args.tiles.split(",")))
    tpu.choose_tiles = lambda *_, **__: fixed
  for k, n, transposed in (D, F, False), (F, D, False), (D, F, True):
    tiles = tpu.choose_tiles(ROWS, k, n, EXPERTS, DTYPE, transposed)
    seconds = (tpu._tgmm_seconds if transposed else tpu._gmm_seconds)(
      ROWS, k, n, EXPERTS, jnp.dtype(DTYPE).itemsize, tiles
    )
    print(
      f"{'tgmm' if transposed else 'gmm'} k={k} n={n}: {tiles}, model "
      f"{seconds * 1e3:.3f} ms"
    )
  for topology in args.topologies:
    compile_for(topology)


if __name__ == "__main__":
  main()
