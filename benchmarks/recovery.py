# SPDX-License-Identifier: Apache-2.0
"""How long a killed run takes to be where it was, at the quickstart's size.

  python benchmarks/recovery.py [--kills 5]

Trains `configs/tiny.py` in a temporary folder, with a cache of programs of its
own that is empty at first, and kills it (SIGKILL) some steps after a
checkpoint. Of each restart it prints the seconds from the start of the process
to the first new step, and what they went into: imports (a process that only
imports what `moejax train` does, measured beside), compilation, and the rest.
"""

import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMPORTS = "import moejax.train, grain, orbax.checkpoint, tensorflow_datasets"


def count_lines(path: pathlib.Path) -> int:
  return len(path.read_bytes().splitlines()) if path.exists() else 0


def launches(run: pathlib.Path) -> list[dict]:
  path = run / "launches.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def time_imports(env: dict[str, str]) -> float:
  start = time.perf_counter()
  subprocess.run([sys.executable, "-c", IMPORTS], env=env, check=True)
  return time.perf_counter() - start


def launch(run: pathlib.Path, config: str, env: dict[str, str], steps: int):
  """Trains until so many steps after the launch's first, then kills it.

  Returns:
    Seconds from the process's start to its first step, and its line of
    launches.jsonl.
  """
  before = len(launches(run))
  start = time.perf_counter()
  process = subprocess.Popen(
    [sys.executable, "-m", "moejax", "train", f"--config={config}",
     f"--workdir={run}", "--config.checkpoint.every=25"],
    env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  first = None
  while process.poll() is None:
    if len(launches(run)) > before:
      line = launches(run)[-1]
      done = count_lines(run / "metrics.jsonl") - line["step"]
      # Lines of later steps are cut when the loop begins.
      if first is None and 0 < done < 5:
        first = time.perf_counter() - start
      if first is not None and done >= steps:
        process.kill()
        process.communicate()
        return first, line
    time.sleep(0.005)
  raise SystemExit(process.communicate()[1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--kills", type=int, default=5)
  parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.py"))
  args = parser.parse_args()
  rng = random.Random(0)
  with tempfile.TemporaryDirectory() as folder:
    place = pathlib.Path(folder)
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMP")}
    env |= {"XDG_CACHE_HOME": str(place / "cache"), "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT)}  # fmt: skip
    os.chdir(place)
    subprocess.run(
      [sys.executable, "-m", "moejax", "data", "prepare",
       f"--config={args.config}"], env=env, check=True,
    )  # fmt: skip
    imports = statistics.median(time_imports(env) for _ in range(3))
    print(f"load {os.getloadavg()[0]:.1f}; imports alone {imports:.2f} s")
    run, rest = place / "run", []
    for number in range(args.kills + 1):
      # Beyond the next checkpoint, then some.
      first, line = launch(run, args.config, env, rng.randrange(30, 45))
      other = first - imports - line["compile"]
      kind = "start" if number == 0 else "restart"
      print(
        f"{kind:<8} from step {line['step']:>4}: first step after {first:5.2f} "
        f"s: imports {imports:.2f}, compilation {line['compile']:.2f}, the "
        f"rest {other:.2f} (of it {line['setup']:.2f} before compilation)"
      )
      if number:
        rest.append((first, other))
    print(
      f"median restart {statistics.median(f for f, _ in rest):.2f} s, beyond "
      f"imports and compilation {statistics.median(o for _, o in rest):.2f} s; "
      f"load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
  main()
