# SPDX-License-Identifier: Apache-2.0
"""What a sweep takes beyond the steps of its runs.

  python benchmarks/sweep_overhead.py --workdir=/some/empty/folder

Eight runs of configs/tiny.py in turn: two learning rates, four seeds. A run's
own time is the sum of its steps' seconds (evaluations, checkpoints and waiting
for input included, as the config asks for them); the rest is the sweep's:
starting, checking, tracing, compiling, the comparison.
"""

import argparse
import pathlib
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
  own = {log.parent: [r["seconds"] for r in read_jsonl(log)] for log in logs}
  total = sum(map(sum, own.values()))
  print(
    f"{len(own)} runs: {wall:.0f} s, of which {total:.0f} s in their steps; "
    f"{wall / total - 1:.1%} beyond"
  )


if __name__ == "__main__":
  main()
