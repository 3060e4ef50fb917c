# SPDX-License-Identifier: Apache-2.0
"""What a sweep takes beyond the steps of its runs.

  python benchmarks/sweep_overhead.py --workdir=/some/empty/folder

Eight runs of configs/tiny.py in turn: two learning rates, four seeds. A run's
own time is the sum of its steps' seconds, with the evaluations and checkpoints
that the config asks for and waiting for input, but as if nothing had to be
compiled: the first step and the first evaluation count as the median ones. The
rest is the sweep's: starting, checking, tracing, compiling, the comparison.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

from moejax.metrics import TIMING, read_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[1]
SWEEP = """
from moejax.sweep import Sweep, grid

def get_sweep():
  return Sweep(
    config={config!r},
    points=grid({{"optimizer.learning_rate": [1e-3, 3e-3]}}),
    seeds=(0, 1, 2, 3),
    title="Overhead",
  )
"""


def own_seconds(log: pathlib.Path) -> float:
  """Of a run's steps and evaluations, as if all programs had been there."""
  rows = read_jsonl(log)
  evaluations = [r["evaluation"] for r in rows if r["evaluation"]]
  steps = [r["seconds"] - r["evaluation"] for r in rows]
  return sum(
    sum(seconds[1:]) + statistics.median(seconds[1:])
    for seconds in (steps, evaluations)
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=500, help="of each run")
  args = parser.parse_args()
  args.workdir.mkdir(parents=True)
  path = args.workdir / "sweep.py"
  path.write_text(SWEEP.format(config=str(ROOT / "configs" / "tiny.py")))
  start = time.perf_counter()
  subprocess.run(
    [sys.executable, "-m", "moejax", "sweep", f"--sweep={path}",
     f"--workdir={args.workdir / 'runs'}",
     f"--config.train.num_steps={args.steps}"],
    check=True, cwd=ROOT,
  )  # fmt: skip
  wall = time.perf_counter() - start
  logs = sorted(args.workdir.glob(f"runs/*/seed_*/{TIMING}"))
  total = sum(map(own_seconds, logs))
  print(
    f"{len(logs)} runs: {wall:.0f} s, of which {total:.0f} s in their steps; "
    f"{wall / total - 1:.1%} beyond"
  )


if __name__ == "__main__":
  main()
