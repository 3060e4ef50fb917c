# SPDX-License-Identifier: Apache-2.0
"""`moejax analyze`: what the routers of checkpoints do on texts, as a page."""

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax import runs
from moejax.analysis import measures, page, results, text
from moejax.analysis.checkpoints import Checkpoint, find, run_name
from moejax.analysis.page import Analysis
from moejax.analysis.similarities import similarity
from moejax.analysis.surveys import Plan, Survey, survey_all
from moejax.analysis.vocabulary import token_table
from moejax.cli import apply_overrides, parse_overrides, whole_number
from moejax.config import ParallelConfig, config_after, default_config
from moejax.errors import ConfigError, UserError
from moejax.progress import format_count
from moejax.run_files import fetched, send_folder

OUTPUT = "analysis"  # the folder beside the newest checkpoint's run


def main(argv: list[str]) -> int:
  """`moejax analyze CHECKPOINT... --data=[NAME=]FILE...`."""
  args, extra = _parse(argv)
  parallel = _mesh_of(extra)
  plan = Plan(
    text.parse_domains(args.data), args.tokens, args.batch_size, args.sample,
    parts=parallel.batch_parts if parallel else 1,
  )  # fmt: skip
  if args.min_count < 1:
    raise ConfigError(f"--min-count={args.min_count} must be positive")
  checkpoints = find(args.checkpoint, parallel)
  last = checkpoints[-1].folder
  folder = args.output or fetched(last) / OUTPUT
  print(analyze(checkpoints, plan, folder, args.min_count))
  if not args.output:
    send_folder(last, OUTPUT)
  return 0


def analyze(
  checkpoints: Sequence[Checkpoint],
  plan: Plan,
  folder: str | os.PathLike,
  min_count: int = 10,
) -> pathlib.Path:
  """Measures, and writes page, pictures and tables.

  Args:
    checkpoints: as `find` returns them; the last one is looked at closely.
    plan: the text.
    folder: where to write to.
    min_count: occurrences that a token id needs.

  Returns:
    Path of index.html.

  Raises:
    DataError: text is missing, unreadable or less than a window.
    ConfigError: the plan's tokens are less than a window of each domain.
    UserError: the folder cannot be written.
  """
  last, folder = checkpoints[-1], pathlib.Path(folder)
  config = config_after(runs.read_config(last.folder), last.step)
  tokenizer = runs.read_tokenizer(last.folder)
  plan.num_rows(config.data)  # refuses too few before anything is computed
  text.require_text(plan.domains, tokenizer, config.data)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    _note_replaced(folder, plan)
    surveys = survey_all(checkpoints, plan, folder)
    found, left_out = measure(surveys, min_count)
    if surveys[-1].num_experts > 1:
      found["similarity"] = alike = similarity(last.load(), plan)
      if alike.num_tokens < plan.sample:
        left_out.append(
          f"similarity: only {alike.num_tokens} of --sample={plan.sample} "
          "tokens, for want of text"
        )
    for line in left_out:
      print(f"note: {line}")
    tokens = None
    if "vocabulary" in found and surveys[-1].total.top_LE.any():
      tokens = token_table(surveys[-1], tokenizer, min_count)
    facts = _facts(checkpoints, surveys)
    return _write(
      Analysis(run_name(last.folder), facts, found, tokens, left_out), folder
    )
  except OSError as e:
    raise UserError(
      f"cannot write to {folder}: {e.strerror or e}; name another --output"
    ) from e


def measure(
  surveys: Sequence[Survey], min_count: int
) -> tuple[dict[str, Any], list[str]]:
  """All measures that surveys allow, by name, and why others are missing."""
  found: dict[str, Any] = {}
  left_out = []
  last = surveys[-1]
  if len(surveys) > 1:
    found["saturation"] = measures.saturation(surveys)
  else:
    left_out.append(
      "saturation needs several checkpoints of a run: name them, or RUN:all"
    )
  together_LEE, chosen_LE = last.total.together_LEE, last.total.chosen_LE
  if together_LEE.sum() > chosen_LE.sum():
    found["co_activation"] = measures.co_activation(last)
  elif chosen_LE.any():
    left_out.append("co-activation: each token has one expert")
  if idle := measures.idle_routers(last):
    left_out.append(
      f"{', '.join(idle)}: no token went to any expert, so loads are 0, and "
      "there is no co-activation or saturation"
    )
  found["domains"] = measures.domain_specialisation(last)
  try:
    found["vocabulary"] = measures.vocabulary_specialisation(last, min_count)
  except ConfigError as e:
    left_out.append(f"vocabulary: {e}")
  found["load"] = measures.load(surveys)
  found["entropy"] = measures.entropy(surveys)
  return found, left_out


def _write(found: Analysis, folder: pathlib.Path) -> pathlib.Path:
  routers = found.results["load"].routers
  record = {
    "name": found.name, "facts": found.facts, "routers": routers,
    "left_out": found.left_out,
  }  # fmt: skip
  tables = {
    name: results.columns(result) for name, result in found.results.items()
  }
  if found.tokens is not None:
    tables["tokens"] = found.tokens
  record |= {
    name: results.summary(result) for name, result in found.results.items()
  }
  summary = folder / "summary.json"
  again = summary.is_file()
  results.write_json(summary, record)
  paths = [
    results.write_table(folder, name, table) for name, table in tables.items()
  ]
  if paths[0].suffix == ".csv":
    print("note: tables are CSV files; Parquet: pip install 'moejax[parquet]'")
  paths += page.write(found, folder)
  if again:
    _remove_others(folder, {path.name for path in paths})
  return paths[-1]


def _note_replaced(folder: pathlib.Path, plan: Plan) -> None:
  """Says so, before anything is computed, if the folder's page is of others."""
  before = results.read_domains(folder / "summary.json")
  if before and set(before) != set(plan.domains):
    print(
      f"note: the page in {folder} is of {', '.join(before)}; this one of "
      f"{', '.join(plan.domains)} takes its place (--output keeps both)"
    )


def _remove_others(folder: pathlib.Path, written: set[str]) -> None:
  """Deletes tables and pictures of the page that was in this folder before."""
  tables = (*page.HEADINGS, "tokens")
  known = {f"{name}{suffix}" for name in tables for suffix in results.SUFFIXES}
  known |= {f"{name}.png" for name in page.PICTURES}
  for name in sorted(known - written):
    (folder / name).unlink(missing_ok=True)


def _facts(
  checkpoints: Sequence[Checkpoint], surveys: Sequence[Survey]
) -> list[str]:
  last = surveys[-1]
  total = last.total
  k = np.mean(total.chosen_LE.sum(1) / total.tokens)
  steps = f"step {last.step:,}"
  if len(surveys) > 1:
    one_run = len({checkpoint.folder for checkpoint in checkpoints}) == 1
    others = [f"{c.step:,}" if one_run else str(c) for c in checkpoints[:-1]]
    steps += f", compared with {', '.join(others)}"
  domains = ", ".join(
    f"{name} {format_count(tally.tokens)}"
    for name, tally in last.domains.items()
  )
  return [
    steps,
    f"{len(last.routers)} routers, {last.num_experts} experts, {k:.3g} a token"
    + (" on average" if k % 1 else ""),
    f"{format_count(total.tokens)} tokens: {domains}",
  ]


def _mesh_of(extra: list[str]) -> ParallelConfig | None:
  """`--config.parallel.AXIS=N`; None without any."""
  if not extra:
    return None
  for path in parse_overrides(extra):
    if not path.startswith("parallel."):
      raise ConfigError(
        f"--config.{path}: the checkpoint's config stays as it is, but for its "
        "mesh, --config.parallel.AXIS=N"
      )
  config = default_config()
  apply_overrides(config, extra)
  return ParallelConfig(**config.parallel.to_dict())


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    "moejax analyze",
    description="What a model's routers do: saturation, co-activation, domain "
    "and vocabulary specialisation, load, entropy, similarity of experts, with "
    "OLMoE's definitions. Writes a page that opens offline, its pictures, a "
    "JSON summary and a table a measure.",
  )
  add = parser.add_argument
  add(
    "checkpoint", nargs="+", metavar="CHECKPOINT",
    help="RUN (its newest step), RUN:step, RUN/step or RUN:all; several are "
    "compared with the last one",
  )  # fmt: skip
  add(
    "--data", action="append", default=[], metavar="[NAME=]FILE",
    help="a kind of text and its file, folder or glob; repeat for each kind. "
    "Without NAME= it is called as the file is, up to the first dot",
  )  # fmt: skip
  add(
    "--tokens", type=whole_number, default=Plan.tokens, metavar="N",
    help="at most so many, as many of each kind (default: %(default)s)",
  )  # fmt: skip
  add("--output", metavar="DIR", help="where to write (default: RUN/analysis)")
  add(
    "--min-count", type=whole_number, default=10, metavar="N",
    help="occurrences that a token id needs (default: %(default)s)",
  )  # fmt: skip
  add(
    "--sample", type=whole_number, default=Plan.sample, metavar="N",
    help="tokens that all experts compute, to compare them (default: "
    "%(default)s)",
  )  # fmt: skip
  add(
    "--batch-size", type=whole_number, default=0, metavar="ROWS",
    help="rows at a time (default: what makes 4,096 tokens)",
  )  # fmt: skip
  parser.epilog = (
    "--config.parallel.fsdp=8 (expert, tensor, data) splits a model over so "
    "many devices, whatever it was trained on."
  )
  return parser.parse_known_args(argv)
