# SPDX-License-Identifier: Apache-2.0
"""`moejax sweep`: lists the points, runs them, compares what came of them."""

import argparse
import dataclasses
import difflib
import sys
from pathlib import Path

from moejax import storage
from moejax.cli import make_importable, parse_overrides
from moejax.errors import ConfigError
from moejax.runlock import EXIT_SAVED
from moejax.sweep.spec import (
  PlannedRun,
  Sweep,
  load_sweep,
  plan_runs,
  run_name,
)
from moejax.sweep.state import (
  check_routers,
  check_same,
  has_begun,
  how_far,
  other_router,
  other_settings,
  read_state,
  to_do,
)


def main(argv: list[str]) -> int:
  """`moejax sweep --sweep=FILE --workdir=DIR`."""
  args, extra = _parse(argv)
  if args.sweep is None or args.workdir is None:
    raise ConfigError("give --sweep=FILE.py and --workdir=DIR")
  storage.require_folder(args.workdir, "--workdir of a sweep")
  whole = load_sweep(args.sweep)
  sweep = _narrowed(whole, args)
  planned = plan_runs(sweep, extra)
  workdir = args.workdir.absolute()
  if args.jobs is not None and args.jobs < 1:
    raise ConfigError(f"--jobs={args.jobs} must be at least 1")
  if args.task is not None and not 0 <= args.task < len(planned):
    raise ConfigError(f"--task={args.task} is not in [0, {len(planned) - 1}]")
  _leave_accelerators_alone()
  if args.dry_run and not args.slurm:
    _list(sweep, planned, workdir)
  chosen = planned if args.task is None else [planned[args.task]]
  compared = _with_runs(whole, sweep, workdir)
  every = plan_runs(compared, extra)
  left = _checked(args, workdir, every, chosen)
  if args.slurm:
    return _slurm(args, extra, workdir, len(planned))
  if args.dry_run:
    return 0
  if not args.compare and _run(workdir, chosen, left, args.jobs or 1):
    print(
      "stopped; the same command goes on, with --compare it draws the page of "
      "what there is",
      flush=True,
    )
    return EXIT_SAVED
  missing = _missing(workdir, chosen)
  _compare(compared, every, workdir, extra)
  return missing


def _checked(
  args: argparse.Namespace,
  workdir: Path,
  every: list[PlannedRun],
  chosen: list[PlannedRun],
) -> list[PlannedRun]:
  """The chosen runs that are to be made, all of which can be."""
  from moejax.sweep.check import check_points

  # Nothing but the script is for a file.
  stream = sys.stderr if args.slurm and args.dry_run else sys.stdout
  check_same(workdir, every)
  left = [] if args.compare else to_do(workdir, chosen)
  notes = check_routers(workdir, every, left)
  if left:
    notes += check_points(left, args.dry_run, stream)
  for note in notes:
    print(note, file=stream, flush=True)
  return left


def _run(
  workdir: Path, chosen: list[PlannedRun], left: list[PlannedRun], jobs: int
) -> bool:
  """Runs what is not done; True if it was stopped before the end."""
  from moejax.sweep.schedule import run_all

  if not left:
    print(f"all {len(chosen)} runs are done", flush=True)
    return False
  done = len(chosen) - len(left)
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
  missing = to_do(workdir, planned)
  for run in missing:
    message = read_state(workdir / run.name).message
    said = f": {message}" if message else ""
    print(f"{run.name}: {how_far(workdir, run)}{said}", file=sys.stderr)
  return 1 if missing else 0


def _list(sweep: Sweep, planned: list[PlannedRun], workdir: Path) -> None:
  print(f"{sweep.title}\n{len(sweep.points)} points, {len(planned)} runs")
  states = [_listed_state(workdir, run) for run in planned]
  width = max(8, *map(len, states))
  for number, (run, state) in enumerate(zip(planned, states)):
    options = {**sweep.points[run.point], "seed": run.seed}
    said = ", ".join(f"{k}={v}" for k, v in options.items())
    print(f"{number:>4}  {run.name:<28} {state:<{width}} {said}")


def _listed_state(workdir: Path, run: PlannedRun) -> str:
  if other_settings(workdir, run):
    return "other settings"
  if other_router(workdir, run):
    return "other router file"
  return how_far(workdir, run)


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


def _with_runs(whole: Sweep, chosen: Sweep, workdir: Path) -> Sweep:
  """What is compared: the chosen points and seeds, and those that have runs.

  Of the file's; its baseline is always among them.
  """
  seeds = list(dict.fromkeys([*whole.seeds, *chosen.seeds]))
  begun = {
    (point, seed)
    for point in whole.points
    for seed in seeds
    if has_begun(workdir / run_name(point, seed))
  }
  points = {*chosen.points, whole.reference, *(point for point, _ in begun)}
  kept = {*chosen.seeds, *(seed for _, seed in begun)}
  return dataclasses.replace(
    whole,
    points={n: o for n, o in whole.points.items() if n in points},
    seeds=tuple(seed for seed in seeds if seed in kept),
  )


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
  add(
    "--compare",
    action="store_true",
    help="only compare what there "
    "is; the exit code is 1 while runs are missing",
  )
  add("--slurm", action="store_true", help="print the script of a Slurm job "
      "array, one task a run, and submit it")  # fmt: skip
  add("--slurm-options", metavar="'--A=B ...'", default="",
      help="sbatch's own: partition, gpus, time")  # fmt: skip
  add("--task", metavar="I", type=int, help="run the I-th run only, as a task "
      "of an array does")  # fmt: skip
  args, extra = parser.parse_known_args(argv)
  _check_further(extra, [f"--{name.replace('_', '-')}" for name in vars(args)])
  return args, extra


def _check_further(extra: list[str], known: list[str]) -> None:
  """Whether they are options of a config, once rather than for each point."""
  words = iter(extra)
  for word in words:
    if word.startswith("--config."):
      if "=" not in word:
        next(words, None)
    elif near := difflib.get_close_matches(word.partition("=")[0], known, 1):
      raise ConfigError(f"unknown argument {word!r}; did you mean {near[0]}?")
  parse_overrides(extra)
