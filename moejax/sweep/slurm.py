# SPDX-License-Identifier: Apache-2.0
"""The sweep as a Slurm job array: one task a run."""

import shlex
import subprocess
from pathlib import Path

from moejax.errors import UserError
from moejax.files import write_atomically

SCRIPT = "array.sbatch"


def array_script(
  command: list[str], workdir: Path, tasks: int, jobs: int, options: str
) -> str:
  """The batch script.

  Args:
    command: what runs one task, but for its number.
    workdir: the sweep's folder, on a file system that all nodes share.
    tasks: runs of the sweep.
    jobs: how many at a time; 0 leaves that to Slurm.
    options: further ones of sbatch, as on its command line.
  """
  limit = f"%{jobs}" if jobs else ""
  lines = [
    "#!/bin/bash",
    f"#SBATCH --job-name={shlex.quote(f'moejax-{workdir.name}')}",
    f"#SBATCH --array=0-{tasks - 1}{limit}",
    f"#SBATCH --output={shlex.quote(f'{workdir}/slurm-%A_%a.log')}",
    # To the process below, which the shell becomes: it saves and ends.
    "#SBATCH --signal=B:TERM@120",
    *(f"#SBATCH {shlex.quote(option)}" for option in shlex.split(options)),
    f"cd {shlex.quote(str(Path.cwd()))}",
    f'exec {shlex.join(command)} --task="$SLURM_ARRAY_TASK_ID"',
  ]
  return "\n".join(lines) + "\n"


def submit(script: str, workdir: Path) -> str:
  """Writes the script into the sweep's folder and submits it.

  Returns:
    What sbatch said.

  Raises:
    UserError: there is no sbatch here, or it refused.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / SCRIPT
  write_atomically(path, script)
  try:
    done = subprocess.run(
      ["sbatch", str(path)], capture_output=True, text=True, check=False
    )
  except FileNotFoundError:
    raise UserError(
      f"there is no sbatch on this machine; on one that has it: sbatch {path}"
    ) from None
  if done.returncode:
    raise UserError(f"sbatch refused {path}: {done.stderr.strip()}")
  return done.stdout.strip()
