# SPDX-License-Identifier: Apache-2.0
"""`moejax scaling fit`, `points` and `flops`."""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from moejax import cli
from moejax.config import Config
from moejax.errors import UserError
from moejax.files import write_atomically
from moejax.models import count
from moejax.progress import progress_bar
from moejax.scaling.fit import RESAMPLES, ScalingFit, fit_points
from moejax.scaling.laws import SIX_ND, hunyuan_large_flops
from moejax.scaling.lengths import row_lengths, tokens_and_flops
from moejax.scaling.points import COUNTS, read_points, to_csv
from moejax.scaling.sweep import plan_points
from moejax.scaling.sweep_file import require_writable, write_sweep
from moejax.scaling.text import describe_fit, describe_points, fit_record


def main(argv: list[str]) -> int:
  """Runs `moejax scaling ...`; returns the exit code."""
  parser = argparse.ArgumentParser(
    "moejax scaling",
    description="Scaling laws: plan the runs, fit their losses, and tell the "
    "compute-optimal size and number of tokens of a budget.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  _add_points(commands)
  _add_fit(commands)
  _add_flops(commands)
  args, extra = parser.parse_known_args(argv)
  if args.command == "fit":
    if extra:
      parser.error(f"unknown argument {extra[0]!r}")
    return _fit(args)
  config = cli.parse_config(args.config, extra)
  if args.command == "flops":
    return _flops(config)
  return _points(args, config, cli.parse_overrides(extra))


def _add_fit(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser(
    "fit",
    help="fit IsoFLOP valleys and the parametric loss to finished runs",
    description="Fits a parabola of loss over ln N for each compute budget, "
    "power laws of their minima, and L(N, D) = E + A/N^alpha + B/D^beta; with "
    "intervals from resampling. Writes fit.json, points.csv and pictures.",
  )
  add = parser.add_argument
  add(
    "runs", nargs="+", metavar="RUN",
    help="folder of a finished run, or a table (.csv, .json) with the columns "
    "active_params, tokens, loss and maybe flops, name",
  )  # fmt: skip
  add("--output", required=True, metavar="DIR", help="where the results go")
  add(
    "--budget", type=_numbers, default=[], metavar="FLOPS[,FLOPS]",
    help="compute to tell the optimal N and D of",
  )  # fmt: skip
  _add_count(parser)
  add(
    "--resamples", type=_resamples, default=RESAMPLES,
    help=f"draws behind each interval (default: {RESAMPLES})",
  )  # fmt: skip
  add("--seed", type=int, default=0, help="of the draws (default: 0)")


def _add_points(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser(
    "points",
    help="plan the runs: sizes of a config's family, at compute budgets",
    description="Scales a config's widths, heads and layers together, with "
    "experts, experts per token, head size and vocabulary as they are, to each "
    "of the sizes; trains each for as many tokens as each budget buys.",
  )
  cli.add_config_arguments(parser)
  add = parser.add_argument
  add(
    "--budgets", type=_numbers, required=True, metavar="FLOPS,FLOPS",
    help="compute of a run, such as 1e18,3e18,1e19",
  )  # fmt: skip
  add(
    "--sizes", type=_numbers, required=True, metavar="N,N",
    help="parameters, such as 1e7,2e7,4e7,8e7,1.6e8; five or more",
  )  # fmt: skip
  _add_count(parser)
  add(
    "--write", metavar="FILE.py", type=Path,
    help="write them as a sweep file, which moejax sweep trains",
  )  # fmt: skip


def _add_flops(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser(
    "flops",
    help="a config's training FLOPs, counted three ways",
    description="The config's own count, 6 N D, and Hunyuan-Large's "
    "9.59 N D + 2.3e8 D (arXiv:2411.02265).",
  )
  cli.add_config_arguments(parser)


def _add_count(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--count", choices=tuple(COUNTS), default="active",
    help="what N counts: parameters a token uses (default), or those without "
    "embedding tables",
  )  # fmt: skip


def _fit(args: argparse.Namespace) -> int:
  points = read_points(args.runs, args.count)
  with progress_bar("resampling", args.resamples, sys.stderr) as bar:
    fit = fit_points(points, args.count, args.resamples, args.seed, bar.advance)
  write_results(fit, args.budget, Path(args.output))
  print(describe_fit(fit, args.budget))
  print(f"\nnumbers and pictures: {args.output}")
  return 0


def write_results(fit: ScalingFit, budgets: list[float], folder: Path) -> None:
  """Writes fit.json, points.csv and the pictures.

  Raises:
    UserError: the folder cannot be written.
  """
  from moejax.report.pictures import save_png
  from moejax.scaling.charts import make_charts

  record = json.dumps(fit_record(fit, budgets), indent=2, allow_nan=False)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "fit.json", record + "\n")
    write_atomically(folder / "points.csv", to_csv(fit.points, fit.count))
    for chart in make_charts(fit, budgets):
      save_png(chart, folder / f"{chart.name}.png")
  except OSError as e:
    raise UserError(f"cannot write to {folder}: {e.strerror or e}") from e


def _points(
  args: argparse.Namespace, config: Config, overrides: Iterable[str]
) -> int:
  if args.write:
    require_writable(args.write)
  with progress_bar("sizes", len(args.sizes), sys.stderr) as bar:
    points = plan_points(
      config, args.budgets, args.sizes, args.count, bar.advance
    )
  print(describe_points(points))
  total = sum(point.flops for point in points)
  print(f"{len(points)} runs, {total:.3g} FLOPs together")
  if args.write:
    write_sweep(args.write, points, args.config, overrides)
    print(f"written: moejax sweep --sweep={args.write} --workdir=DIR")
  return 0


def _flops(config: Config) -> int:
  """Prints FLOPs per token and of the run, by each count."""
  active = count(config.model).num_active_params
  tokens, whole = tokens_and_flops(config)
  own = whole / tokens  # of a token, in the mean over phases
  lengths = " and ".join(f"{length:,}" for length in row_lengths(config))
  rows = {
    "the config's own": own,
    "6 N D": SIX_ND.flops(active, 1),
    "9.59 N D + 2.3e8 D": hunyuan_large_flops(active, 1),
  }
  print(
    f"N = {active:,} active parameters, D = {tokens:,} tokens of the run, in "
    f"rows of {lengths}\n"
  )
  print(f"{'count':<22}{'a token':>12}{'the run':>12}{'ratio':>8}")
  for name, flops in rows.items():
    print(f"{name:<22}{flops:>12.4g}{flops * tokens:>12.4g}{flops / own:>8.3f}")
  return 0


def _numbers(text: str) -> list[float]:
  """`1e18,3e18` as numbers."""
  try:
    found = [float(part) for part in text.split(",") if part.strip()]
  except ValueError:
    raise argparse.ArgumentTypeError(
      f"{text!r} is no list of numbers"
    ) from None
  if not found or not all(math.isfinite(x) and x > 0 for x in found):
    raise argparse.ArgumentTypeError(f"{text!r}: give positive numbers")
  return found


def _resamples(text: str) -> int:
  number = cli.whole_number(text)
  if number < 20:
    raise argparse.ArgumentTypeError(f"{number} are too few; use 100 or more")
  return number
