# SPDX-License-Identifier: Apache-2.0
"""A run as a page: curves, expert loads, speed, samples, config.

`moejax report runs/x` writes runs/x/report/index.html, one file that opens
without a network, and its pictures as PNG files beside it.
"""

import argparse
import os
from pathlib import Path

from moejax.errors import UserError
from moejax.report.charts import Chart
from moejax.report.rundata import RunData, load_run_data
from moejax.run_files import fetched, send_folder

OVERVIEW = "overview.png"


def main(argv: list[str]) -> int:
  """`moejax report RUN [RUN ...] [--output DIR]`."""
  parser = argparse.ArgumentParser(
    "moejax report",
    description="Draw a run as a page: loss, learning rate, gradients, speed, "
    "expert loads, routing, samples, config and versions. The page is one "
    "file, opens offline and on a telephone; its pictures lie beside it as "
    "PNG files, overview.png among them. Works while the run goes on.",
  )
  parser.add_argument(
    "workdir", nargs="+", metavar="RUN", help="a run's folder"
  )
  parser.add_argument(
    "--output", metavar="DIR",
    help="where to write index.html and the PNG files (default: RUN/report)",
  )  # fmt: skip
  args = parser.parse_args(argv)
  if args.output and len(args.workdir) > 1:
    raise UserError("--output takes one run; leave it out for several")
  _leave_accelerators_alone()
  for workdir in args.workdir:
    print(write_report(workdir, args.output))
  return 0


def write_report(
  workdir: str | os.PathLike, output: str | os.PathLike | None = None
) -> Path:
  """Writes a run's page and pictures.

  Args:
    workdir: the run's folder.
    output: folder to write to; `report` in the run's folder if None.

  Returns:
    Path of index.html.

  Raises:
    DataError: no run in `workdir`, or none with a finished step.
    UserError: the report cannot be written there.
  """
  from moejax.report import page, pictures

  source = fetched(workdir)
  run = load_run_data(source)
  sections = make_charts(run)
  folder = source / "report" if output is None else Path(output)
  charts = [chart for group in sections.values() for chart in group]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page.render(run, sections), encoding="utf-8")
    temporary.replace(path)
    for chart in charts:
      pictures.save_png(chart, folder / f"{chart.name}.png")
    pictures.save_overview(run, charts, folder / OVERVIEW)
  except OSError as e:
    raise UserError(f"cannot write the report to {folder}: {e}") from e
  if output is None:
    send_folder(workdir, folder.name)
  return path


def make_charts(run: RunData) -> dict[str, list[Chart]]:
  """All charts that this run has data for, by section."""
  from moejax.report import curves, domains, loads

  training = [
    curves.loss_chart(run), curves.learning_rate_chart(run),
    curves.gradient_chart(run), curves.recent_chart(run),
    curves.throughput_chart(run), curves.time_chart(run),
  ]  # fmt: skip
  routing = [
    loads.load_map_chart(run), loads.spread_chart(run),
    loads.final_load_chart(run), loads.busiest_chart(run),
    loads.entropy_chart(run), loads.balance_chart(run),
    loads.router_z_chart(run),
  ]  # fmt: skip
  drawn = {
    "loss/xent", "learning_rate", "grad_norm", "tokens", "router/entropy",
    "router/max_over_mean", "loss/balance", "loss/router_z",
    # Numbers that stand for something; the page says it in words.
    "batch_digest", "phase", "skipped",
  }  # fmt: skip
  others = [
    curves.metric_chart(run, key)
    for key in run.metrics.columns
    if key not in drawn and not key.startswith("sources/")
  ]
  text = [domains.sources_chart(run), domains.held_out_chart(run)]
  sections = {
    "": training, "Routing": routing, "Kinds of text": text,
    "Tasks": [domains.tasks_chart(run)],
    "Other metrics": others,
  }  # fmt: skip
  return {
    heading: [chart for chart in charts if chart is not None]
    for heading, charts in sections.items()
  }


def _leave_accelerators_alone() -> None:
  """The learning-rate plan needs JAX; the run may need the device's memory."""
  import jax

  jax.config.update("jax_platforms", "cpu")
