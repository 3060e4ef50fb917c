# SPDX-License-Identifier: Apache-2.0
"""`moejax sweep`: lists the points, runs them, compares what came of them."""

import argparse
import dataclasses
import sys
from pathlib import Path

from moejax.cli import make_importable
from moejax.errors import ConfigError
from moejax.runlock import EXIT_SAVED
from moejax.sweep.spec import PlannedRun, Sweep, load_sweep, plan_runs
from moejax.sweep.state import (
  DONE,
  check_routers,
  check_same,
  read_state,
  to_do,
)


def main(argv: list[str]) -> int:
  """`moejax sweep --sweep=FILE --workdir=DIR`."""
  args, extra = _parse(argv)
  if args.sweep is None or args.workdir is None:
    raise ConfigError("give --sweep=FILE.py and --workdir=DIR")
  sweep = _narrowed(load_sweep(args.sweep), args)
  planned = plan_runs(sweep, extra)
  workdir = args.workdir.absolute()
  if args.jobs is not None and args.jobs < 1:
    raise ConfigError(f"--jobs={args.jobs} must be at least 1")
  if args.dry_run and not args.slurm:
    _list(sweep, planned, workdir)
    return 0
  if args.slurm:
    return _slurm(args, extra, workdir, len(planned))
  if args.task is not None:
    if not 0 <= args.task < len(planned):
      raise ConfigError(f"--task={args.task} is not in [0, {len(planned) - 1}]")
  _leave_accelerators_alone()
  chosen = planned if args.task is None else [planned[args.task]]
  check_same(workdir, planned)
  left = [] if args.compare else to_do(workdir, chosen)
  for note in check_routers(workdir, planned, left):
    print(note, flush=True)
  stopped = False
  if not args.compare:
    stopped = _run(workdir, chosen, args.jobs or 1)
  if stopped:
    print("stopped; the same command goes on", flush=True)
    return EXIT_SAVED
  missing = _missing(workdir, chosen)
  _compare(sweep, planned, workdir, extra)
  return missing


def _run(workdir: Path, planned: list[PlannedRun], jobs: int) -> bool:
  """Runs what is not done; True if it was stopped before the end."""
  from moejax.sweep.check import check_points
  from moejax.sweep.schedule import run_all

  left = to_do(workdir, planned)
  if not left:
    print(f"all {len(planned)} runs are done", flush=True)
    return False
  check_points(left)
  done = len(planned) - len(left)
  print(
    f"{len(left)} runs{f', {done} more are done' if done else ''}, "
    f"{jobs} at a time, in {workdir}",
    flush=True,
  )
  return run_all(workdir, left, jobs)


def _compare(
  sweep: Sweep, planned: list[PlannedRun], workdir: Path, extra: list[str]
) -> None:
  """Prints the table and draws the page, of what there is."""
  from moejax.sweep.compare import compare
  from moejax.sweep.page import write_page
  from moejax.sweep.table import as_text, write_tables

  comparison = compare(sweep, planned, workdir, extra)
  print("\n" + as_text(comparison), flush=True)
  write_tables(comparison, workdir)
  print(f"comparison: {write_page(comparison, workdir)}", flush=True)


def _missing(workdir: Path, planned: list[PlannedRun]) -> int:
  """1 if runs are not done, and which and why."""
  states = {r.name: read_state(workdir / r.name) for r in planned}
  missing = {n: s for n, s in states.items() if s.state != DONE}
  for name, state in missing.items():
    said = f": {state.message}" if state.message else ""
    print(f"{name}: {state.state}{said}", file=sys.stderr)
  return 1 if missing else 0


def _list(sweep: Sweep, planned: list[PlannedRun], workdir: Path) -> None:
  print(f"{sweep.title}\n{len(sweep.points)} points, {len(planned)} runs")
  for number, run in enumerate(planned):
    options = {**sweep.points[run.point], "seed": run.seed}
    said = ", ".join(f"{k}={v}" for k, v in options.items())
    state = read_state(workdir / run.name).state
    print(f"{number:>4}  {run.name:<28} {state:<8} {said}")


def _slurm(
  args: argparse.Namespace, extra: list[str], workdir: Path, tasks: int
) -> int:
  from moejax.sweep.slurm import array_script, submit

  command = [
    sys.executable, "-m", "moejax", "sweep", f"--sweep={args.sweep}",
    f"--workdir={workdir}", *extra,
  ]  # fmt: skip
  command += [f"--seeds={args.seeds}"] if args.seeds else []
  command += [f"--points={args.points}"] if args.points else []
  script = array_script(
    command, workdir, tasks, args.jobs or 0, args.slurm_options
  )
  print(script, end="")
  if not args.dry_run:
    print(submit(script, workdir))
  return 0


def _narrowed(sweep: Sweep, args: argparse.Namespace) -> Sweep:
  """The sweep with the points and seeds that the command line names."""
  if args.seeds:
    try:
      seeds = tuple(int(s) for s in args.seeds.split(","))
    except ValueError:
      raise ConfigError(f"--seeds={args.seeds} must be like 0,1,2") from None
    sweep = dataclasses.replace(sweep, seeds=seeds)
  if args.points:
    names = args.points.split(",")
    if unknown := sorted(set(names) - set(sweep.points)):
      raise ConfigError(
        f"--points: no point {', '.join(unknown)}; there are "
        f"{', '.join(sweep.points)}"
      )
    points = {n: sweep.points[n] for n in sweep.points if n in names}
    baseline = sweep.baseline if sweep.baseline in points else ""
    sweep = dataclasses.replace(sweep, points=points, baseline=baseline)
  make_importable(str(Path(args.sweep).absolute().parent))
  return sweep


def _leave_accelerators_alone() -> None:
  """They are for the runs' own processes."""
  import jax

  jax.config.update("jax_platforms", "cpu")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    "moejax sweep",
    description="Run each point of a sweep with each seed, then compare them: "
    "a table and a page. Started again with the same command it skips what is "
    "done, goes on with what was killed and repeats what failed.",
    epilog="Further options, --config.SECTION.OPTION=VALUE, go to all points.",
  )
  add = parser.add_argument
  add("--sweep", metavar="FILE.py[:ARG]",
      help="its get_sweep(ARG) returns a moejax.sweep.Sweep")  # fmt: skip
  add("--workdir", metavar="DIR", type=Path,
      help="the sweep's folder; runs are POINT/seed_N below it")  # fmt: skip
  add("--jobs", metavar="N", type=int, help="runs at a time (default 1)")
  add("--seeds", metavar="A,B,...", help="instead of the file's")
  add("--points", metavar="A,B,...", help="only these of the file's")
  add("--dry-run", action="store_true", help="list the runs, or print the "
      "Slurm script, and do nothing")  # fmt: skip
  add("--compare", action="store_true", help="only compare what there is")
  add("--slurm", action="store_true", help="print the script of a Slurm job "
      "array, one task a run, and submit it")  # fmt: skip
  add("--slurm-options", metavar="'--A=B ...'", default="",
      help="sbatch's own: partition, gpus, time")  # fmt: skip
  add("--task", metavar="I", type=int, help="run the I-th run only, as a task "
      "of an array does")  # fmt: skip
  return parser.parse_known_args(argv)
