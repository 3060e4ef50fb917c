# SPDX-License-Identifier: Apache-2.0
"""Speed of the grouped matmul's CPU back ends beside a dense product.

  python benchmarks/grouped_matmul.py [--repeats 15] [--only skewed]

The dense product has one weight and the same FLOPs. All are timed in turn,
again and again, in one process; a ratio is dense time over back-end time, from
medians, so 1 is as fast as dense. Forward is one product, backward two more.
"""

import argparse
import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from moejax.hardware import keep_freed_memory
from moejax.ops.grouped_matmul import choose_backend, grouped_matmul

# name: (rows, D, F, experts, distribution, floors of forward and both)
CASES = {
  "skewed": (16384, 512, 256, 64, "dirichlet", (0.65, 0.55)),
  "uniform": (16384, 512, 256, 64, "even", (0.8, 0.8)),
  "8 experts": (4096, 1024, 2816, 8, "dirichlet", (0.8, 0.8)),
  "ragged_dot": (1024, 512, 256, 64, "dirichlet", None),
  "decode 8": (8, 512, 256, 64, "tokens", None),
  "decode 64": (64, 512, 256, 64, "tokens", None),
}


def group_sizes(rows: int, experts: int, distribution: str) -> np.ndarray:
  rng = np.random.default_rng(0)
  if distribution == "even":
    return np.full(experts, rows // experts, np.int32)
  concentration = 2.0 if distribution == "dirichlet" else 1e6
  share = rng.dirichlet(np.full(experts, concentration))
  return rng.multinomial(rows, share).astype(np.int32)


def contestants(name: str) -> dict:
  """`(x_AD, w_EDF, sizes_E) -> y_AF` by name; dense comes first."""
  found = {"dense": lambda x_AD, w_EDF, sizes_E: x_AD @ w_EDF[0]}
  for backend in ("cpu", "cpu_loops"):
    found[backend] = functools.partial(grouped_matmul, backend=backend)
  if name == "ragged_dot":
    found["lax.ragged_dot"] = jax.lax.ragged_dot
  return found


def gradients(multiply):
  def run(x_AD, w_EDF, sizes_E, dy_AF):
    y_AF, vjp = jax.vjp(lambda x, w: multiply(x, w, sizes_E), x_AD, w_EDF)
    return y_AF, *vjp(dy_AF)

  return run


def measure(functions: dict, arguments: dict, repeats: int) -> dict:
  """Seconds of every repeat, interleaved: what disturbs one disturbs all."""
  seconds = {name: [] for name in functions}
  for i in range(repeats + 2):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function(*arguments[name]))
      if i >= 2:  # the first compiles, the second warms up
        seconds[name].append(time.perf_counter() - start)
  return seconds


def run_case(name: str, repeats: int) -> None:
  rows, d, f, experts, distribution, floors = CASES[name]
  sizes_E = jnp.asarray(group_sizes(rows, experts, distribution))
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(
    rng.standard_normal(shape, dtype=np.float32)
  )
  x_AD, w_EDF, dy_AF = draw(rows, d), draw(experts, d, f), draw(rows, f)
  used = int((sizes_E > 0).sum())
  print(
    f"\n{name}: [{rows}, {d}] x [{experts}, {d}, {f}], groups of "
    f"{sizes_E.min()} to {sizes_E.max()} rows, {used} not empty"
  )
  backward = not distribution == "tokens"
  functions, arguments = {}, {}
  for who, multiply in contestants(name).items():
    # Dense gets one weight, so that its gradient is not padded with zeros.
    w = w_EDF[:1] if who == "dense" else w_EDF
    functions[who, 1] = jax.jit(multiply)
    arguments[who, 1] = x_AD, w, sizes_E
    if backward:
      functions[who, 3] = jax.jit(gradients(multiply))
      arguments[who, 3] = x_AD, w, sizes_E, dy_AF
  seconds = measure(functions, arguments, repeats)
  flops = 2 * rows * d * f
  traffic = 4 * used * d * f
  print(
    "  back end        products   min ms  median ms  GFLOP/s   GB/s of "
    "weights   ratio"
  )
  for (who, products), times in seconds.items():
    median = statistics.median(times)
    ratio = statistics.median(seconds["dense", products]) / median
    floor = ""
    if who == "cpu" and floors:
      least = floors[0 if products == 1 else 1]
      floor = f"  floor {least}: {'met' if ratio >= least else 'MISSED'}"
    print(
      f"  {who:15} {products:8} {min(times) * 1e3:9.2f} "
      f"{median * 1e3:9.2f} {products * flops / median / 1e9:9.1f} "
      f"{traffic / median / 1e9 if who != 'dense' else 0:14.1f} "
      f"{ratio:13.2f}{floor}"
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=15)
  parser.add_argument("--only", choices=list(CASES))
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  keep_freed_memory()  # as training does
  print(
    f"jax {jax.__version__}; {os.cpu_count()} cores; {choose_backend('cpu')[1]}"
  )
  for name in [args.only] if args.only else CASES:
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    run_case(name, args.repeats)
    print(f"  load average before and after: {load}; {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
  main()
