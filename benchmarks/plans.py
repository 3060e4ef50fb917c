# SPDX-License-Identifier: Apache-2.0
"""Plans of the published systems on the pods that their configs name.

  python benchmarks/plans.py [NAME...]

Reads the `moejax plan` command of each config's docstring and prints a row of
the table in docs/pods.md. A minute or more each; the extra [plan] is needed.
"""

import re
import sys
from pathlib import Path

import jax

from moejax import cli
from moejax.plan import plan
from moejax.plan.report import mesh_name, tokens_a_step
from moejax.progress import format_bytes

CONFIGS = Path(__file__).parents[1] / "configs"
COMMAND = re.compile(
  r"moejax plan --config=\S+ --topology=(\S+)((?: \\\n +--\S+| --\S+)*)"
)


def main() -> None:
  jax.config.update("jax_platforms", "cpu")
  names = sys.argv[1:] or [p.stem for p in sorted(CONFIGS.glob("*.py"))]
  print(
    "| config | chips | mesh; remat | tokens a chip | a chip needs | "
    "MFU < | without network | the run, days > | compiled in |"
  )
  print("| --- " * 9 + "|")
  for name in names:
    path = CONFIGS / f"{name}.py"
    found = COMMAND.search(path.read_text())
    if not found:
      continue
    topology, options = found.groups()
    config = cli.parse_config(str(path), re.findall(r"--config\.\S+", options))
    made = plan(config, topology)
    line, tokens = made.roofline, tokens_a_step(config)
    days = config.train.num_steps * line.seconds / 86400
    print(
      f"| {name} | {topology} | {mesh_name(config)}; {config.model.remat} | "
      f"{tokens // made.devices:,} | {format_bytes(made.memory.total)} | "
      f"{made.mfu(line.seconds):.1%} | {made.mfu(line.local):.1%} | "
      f"{days:.3g} | {made.compiled_in:.0f} s |",
      flush=True,
    )


if __name__ == "__main__":
  main()
