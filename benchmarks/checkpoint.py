# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint costs the training loop, beside plain Orbax.

  python benchmarks/checkpoint.py --millions 5 100 --repeats 5

For a state of parameters and two moments in float32 it times, in one run, turn
about: the blocking part of `save`, all of it until the step is committed, the
slow-down of a matmul loop meanwhile, the digests of what was written once more
by themselves, and a restore with its digests checked.
"Plain" is Orbax's AsyncCheckpointer on the same arrays, with neither digests
nor fsync. Medians are printed.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from moejax.checkpoint import Checkpointer, files

TENSORS = 16  # arrays of each of parameters and moments


def make_state(num_params: int) -> dict:
  def tree(seed: int) -> dict:
    # Random, as zeros would make a sparse file or compress.
    keys = jax.random.split(jax.random.key(seed), TENSORS)
    shape = (num_params // TENSORS // 1000, 1000)
    return {f"w{i}": jax.random.normal(k, shape) for i, k in enumerate(keys)}

  state = {
    "params": tree(0),
    "opt_state": {"mu": tree(1), "nu": tree(2), "count": jnp.int32(0)},
  }
  return jax.block_until_ready(state)


def work_until(done, matmul, x) -> tuple[int, float]:
  """Multiplies until `done()`; returns (products, seconds)."""
  count, start = 0, time.perf_counter()
  while True:
    x = jax.block_until_ready(matmul(x))
    count += 1
    if done():
      return count, time.perf_counter() - start


def time_moejax(folder: str, state, repeats: int, matmul, x) -> dict:
  times = {
    "blocking": [], "total": [], "busy": [], "restore": [], "digests": []
  }  # fmt: skip
  with Checkpointer(folder, keep_last=1) as ckpt:
    for step in range(1, repeats + 1):
      start = time.perf_counter()
      ckpt.save(step, state, {"step": step})
      times["blocking"].append(time.perf_counter() - start)
      ckpt.wait()
      times["total"].append(time.perf_counter() - start)
      written = epath.Path(folder) / str(step)
      start = time.perf_counter()
      files.digest_files(written, files.list_files(written))
      times["digests"].append(time.perf_counter() - start)
    ckpt.save(repeats + 1, state, {})
    thread = ckpt._thread
    count, seconds = work_until(lambda: not thread.is_alive(), matmul, x)
    times["busy"].append(seconds / count)
    ckpt.wait()
    abstract = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
      state,
    )
    for _ in range(min(2, repeats)):
      start = time.perf_counter()
      jax.block_until_ready(ckpt.restore(abstract).state)
      times["restore"].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in times.items()}


def time_plain(folder: str, state, repeats: int) -> dict:
  times = {"blocking": [], "total": []}
  handler = ocp.PyTreeCheckpointHandler(use_compression=False)
  with ocp.AsyncCheckpointer(handler) as ckpt:
    for step in range(repeats):
      start = time.perf_counter()
      path = os.path.join(folder, str(step))
      ckpt.save(path, ocp.args.PyTreeSave(state))
      times["blocking"].append(time.perf_counter() - start)
      ckpt.wait_until_finished()
      times["total"].append(time.perf_counter() - start)
      shutil.rmtree(path)
  return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--millions", type=float, nargs="+", default=[5, 100])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--folder", help="where to write; default: temporary")
  parser.add_argument(
    "--interval", type=float, default=600, help="seconds between checkpoints"
  )
  args = parser.parse_args()
  x = jnp.ones((1024, 1024))
  matmul = jax.jit(lambda a: (a @ a) / 1024)
  jax.block_until_ready(matmul(x))
  load = os.getloadavg()[0]
  print(
    f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
    f"{os.cpu_count()} cores, load {load:.1f}, jax {jax.__version__}"
  )
  for millions in args.millions:
    state = make_state(int(millions * 1e6))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    idle = [work_until(lambda: True, matmul, x)[1] for _ in range(20)]
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
      plain = time_plain(os.path.join(folder, "plain"), state, args.repeats)
      ours = time_moejax(
        os.path.join(folder, "moejax"), state, args.repeats, matmul, x
      )
    finally:
      shutil.rmtree(folder)
    background = ours["total"] - ours["blocking"]
    slowdown = ours["busy"] / statistics.median(idle)
    print(
      f"{millions:g} M parameters, {size / 1e6:.0f} MB\n"
      f"  blocking    {ours['blocking'] * 1e3:8.1f} ms   "
      f"(plain {plain['blocking'] * 1e3:.1f} ms), "
      f"{ours['blocking'] / args.interval:.4%} of {args.interval:g} s\n"
      f"  background  {background:8.2f} s    "
      f"(whole save {ours['total'] / plain['total']:.2f} x plain), "
      f"{background / args.interval:.2%} of {args.interval:g} s\n"
      f"  a step meanwhile takes {slowdown:.2f} x as long\n"
      f"  digests     {ours['digests']:8.2f} s    of all files by themselves, "
      f"{ours['digests'] / ours['total']:.1%} of the save\n"
      f"  restore     {ours['restore']:8.2f} s    digests checked"
    )


if __name__ == "__main__":
  main()
