# SPDX-License-Identifier: Apache-2.0
"""Training: config -> data -> model -> step -> logs, evaluations, checkpoints.

A run is its folder. Started again with the same folder, it goes on from its
newest valid checkpoint and ends with the same bytes as if never stopped.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import data as data_lib
from moejax import goodput, runs
from moejax.checkpoint import processes
from moejax.cli import add_config_arguments, parse_config, whole_number
from moejax.config import (
  Config,
  ParallelConfig,
  default_config,
  describe_options,
  differences,
  phases_of,
  require_mesh_fits,
)
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import ConfigError, DataError, UserError
from moejax.generate import can_generate
from moejax.hardware import keep_freed_memory, keep_programs
from moejax.held_out import HeldOut
from moejax.init_from import weights_of
from moejax.loop import Loop
from moejax.memory import (
  check_evaluation_fits,
  check_state_fits,
  compile_phases,
)
from moejax.metrics import FILES
from moejax.models import Transformer, count
from moejax.models.transformer import describe_backends
from moejax.parallel import build_on_mesh, distributed, make_mesh
from moejax.profiling import ProfileWindow
from moejax.resume import (
  branch_point,
  how_to_go_on,
  refuse_converted,
  restore_or_none,
)
from moejax.run_files import RunFiles, fetched
from moejax.runlock import EXIT_SAVED, PreemptionGuard
from moejax.step import (
  TrainState,
  abstract_state,
  init_state,
  state_shardings,
)

# Seconds that compilers of a run's processes may be apart.
COMPILED_WITHIN = 6 * 3600.0


def main(argv: list[str]) -> int:
  """`moejax train --config=FILE --workdir=DIR`."""
  args, extra = _parse(argv)
  if args.help_config:
    print("\n".join(describe_options()))
    return 0
  if args.config is None and args.workdir is None:
    raise ConfigError("give --config=FILE.py and --workdir=DIR")
  if args.config is not None:
    config = parse_config(args.config, extra)
  else:
    stored = runs.read_config(args.workdir).to_dict()
    config = _override(stored, extra)
  if args.print_config:
    print(json.dumps(config.to_dict(), indent=2))
    return 0
  if args.workdir is None:
    raise ConfigError("--workdir=DIR is missing: where the run shall live")
  with distributed.joined(args, args.workdir):
    # Each would train its own model in part, and nothing would look wrong.
    mine = config.to_dict() | {"--stop-at": args.stop_at}
    changed = differences(processes.settings_of_first(mine), mine)
    if not processes.all_true(not changed):
      what = "another process has not the settings of process 0"
      if changed:
        what = f"not the settings of process 0: {'; '.join(changed[:3])}"
      raise ConfigError(f"{what}; start all with the same command")
    profile = ProfileWindow.parse(args.profile) if args.profile else None
    return train(
      config, args.workdir, not args.no_report, profile, args.stop_at
    )


def train(
  config: Config,
  workdir: str | os.PathLike,
  report: bool = True,
  profile: ProfileWindow | None = None,
  stop_at: int | None = None,
) -> int:
  """Trains to `train.num_steps`, from the newest checkpoint if there is one.

  Args:
    config: of the run.
    workdir: its folder.
    report: whether to draw its page at the end.
    profile: steps to look at with JAX's profiler.
    stop_at: save and return after this step, if it comes before the end;
      nothing else of the run depends on it.

  Returns:
    0 when finished, `EXIT_SAVED` when stopped by SIGTERM or SIGINT after
    saving; the same command then goes on.

  Raises:
    UserError: anything that a person can fix; nothing is half-written.
  """
  first, began = jax.process_index() == 0, time.time()
  end = last = config.train.num_steps
  if stop_at is not None:
    if stop_at < 1:
      raise ConfigError(f"--stop-at={stop_at} must be a step, from 1 on")
    end = min(stop_at, last)
  files = RunFiles(workdir, first)
  workdir = files.workdir
  keep_freed_memory()
  keep_programs()
  # Before anything is written: what is wrong with the data or the config.
  if profile is not None:
    profile.require_before(last)
    if profile.first > end:
      print(f"note: {profile} begins after --stop-at={stop_at}: not yet")
      profile = None
  refuse_converted(workdir)
  tokenizer = load_tokenizer_of(config)
  stores = data_lib.PhasedStores.open(config, tokenizer)
  if config.eval.every and not all(s.rows("validation") for s in stores.stores):
    raise DataError(
      "no validation rows: raise data.validation_fraction and prepare again, "
      "or set eval.every=0"
    )
  held_out = HeldOut(config, tokenizer)
  mesh = make_mesh(config.parallel)
  model = build_on_mesh(config, mesh)
  shardings = state_shardings(config, model, mesh)
  abstract = abstract_state(config, model, shardings)
  check_state_fits(abstract)
  with files, PreemptionGuard() as guard:
    with runs.open_checkpoints(config, files) as checkpoints:
      restored = restore_or_none(
        config, abstract, checkpoints, tokenizer, stores
      )
      state = (
        restored.state
        if restored
        else fresh_state(config, model, tokenizer, shardings)
      )
      start = int(state.step)
      require_mesh_fits(config, start, end)
      if first and start and checkpoints.is_empty():
        _take_logs(config, files.folder)
      if profile is not None:
        profile = profile.left(start, end, workdir)
      announce(config, model, stores, workdir, start)
      if start >= end:
        more = f"--stop-at={stop_at} is no more than that"
        more = more if end < last else how_to_go_on(config)
        print(f"already trained to step {start}; {more}")
        if first:
          runs.write_files(files.folder, config, tokenizer)
        if report:
          _report(files.folder)
        return 0
      left = [p for p in phases_of(config) if p.end > start and p.start < end]
      # They evaluate and write; training has the programs below.
      models = {
        p: build_on_mesh(p.config, mesh, dropless=True)
        for p in phases_of(config)
      }
      loop = Loop(
        config,
        models,
        tokenizer,
        stores,
        checkpoints,
        files,
        state,
        restored,
        held_out,
        profile,
        end,
      )
      # All of them now: the last phase is not to fail after a month.
      ready = time.time()
      programs = compile_phases(config, model, mesh, left)
      check_evaluation_fits(models, left, abstract)
      # They share steps from here: who waits in one has a library's patience.
      processes.barrier("moejax_compiled", COMPILED_WITHIN)
      if first:
        runs.write_files(files.folder, config, tokenizer)
        compiling = time.time() - ready
        goodput.record_launch(
          files.folder, start, began, ready - began, compiling
        )
      stopped = loop.run(programs, guard)
      if first:
        goodput.record_end(files.folder, loop.step, loop.times)
    if first and (found := goodput.of_run(files.folder)):
      print(found.describe(), flush=True)
    if report:
      _report(files.folder)
  if stopped:
    print(f"stopped at step {loop.step}, saved; run the same command to go on")
    return EXIT_SAVED
  if end < last:
    print(f"stopped at step {end} of {last}, saved; without --stop-at the same "
          "command goes on")  # fmt: skip
  return 0


def load_tokenizer_of(config: Config) -> Tokenizer:
  """The config's tokenizer, checked against the model's vocabulary."""
  tokenizer = load_tokenizer(config.data.tokenizer)
  if tokenizer.vocab_size > config.model.vocab_size:
    raise ConfigError(
      f"the tokenizer {config.data.tokenizer!r} has {tokenizer.vocab_size} "
      f"tokens, model.vocab_size={config.model.vocab_size} holds fewer; use "
      f"{-(-tokenizer.vocab_size // 128) * 128}"
    )
  return tokenizer


def announce(
  config: Config,
  model: Transformer,
  stores: data_lib.PhasedStores,
  workdir: str | Path,
  start: int,
) -> None:
  """Prints what runs where, once."""
  counts = count(config.model)
  tokens = config.train.batch_size * config.data.seq_len
  print(
    f"model: {counts.num_params:,} parameters, {counts.num_active_params:,} "
    f"active per token; {config.model.num_layers} layers"
  )
  print(
    f"data: {stores.stores[0].describe()}; {tokens:,} tokens a batch, "
    f"{config.train.num_steps} steps"
  )
  for line in stores.describe_exhausted():
    print(f"data: {line}")
  unseen = [
    s.source for s in stores.stores[0].stores if not s.rows("validation")
  ]
  if config.eval.every and unseen:
    print(f"note: validation has no rows of {', '.join(unseen)}")
  for line in describe_backends(model, config.data.seq_len):
    print(line)
  if config.eval.sample_tokens and not can_generate(config.model):
    print(
      f"note: no samples: router {config.model.moe.router!r} looks at later "
      "tokens and cannot generate; validation losses look at them too"
    )
  split = {axis: getattr(config.parallel, axis) for axis in ParallelConfig.AXES}
  if config.parallel.num_devices > 1:
    names = (f"{axis}={ways}" for axis, ways in split.items() if ways > 1)
    print(f"mesh: {', '.join(names)} on {jax.device_count()} devices")
  elif jax.device_count() > 1:
    print(
      f"note: this run uses one of {jax.device_count()} devices; "
      f"--config.parallel.data={jax.device_count()} uses all",
      file=sys.stderr,
    )
  verb = f"goes on at step {start}" if start else "starts"
  print(f"{workdir}: {verb}; compiling the step...", flush=True)


def fresh_state(
  config: Config,
  model: Transformer,
  tokenizer: Tokenizer,
  shardings: TrainState,
) -> TrainState:
  """What a run begins with: drawn, or the weights of `train.init_from`."""
  # The key is no constant of the program, which all seeds then share.
  key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
  make = lambda key: init_state(config, model, jax.random.wrap_key_data(key))
  state = jax.jit(make, out_shardings=shardings)(key)
  if not config.train.init_from:
    return state
  weights = weights_of(config, tokenizer)
  if config.optimizer.ema:  # of what has been trained so far
    weights = weights | {"ema": weights["params"]}
  return state.replace(
    **{
      name: jax.device_put(_on_host(tree), getattr(shardings, name))
      for name, tree in weights.items()
    }
  )


def _take_logs(config: Config, folder: Path) -> None:
  """A branch begins with the lines of what it goes on from."""
  run, step = branch_point(config.train.branch_from)
  print(f"a branch of {run}, step {step}")
  source = fetched(run)
  folder.mkdir(parents=True, exist_ok=True)
  for name in FILES:  # `RunLog` cuts what came later
    if (source / name).exists():
      shutil.copyfile(source / name, folder / name)


def _on_host(tree: Any) -> Any:
  return jax.tree.map(np.asarray, tree)


def _report(folder: Path) -> None:
  if jax.process_index():
    return
  from moejax.report import write_report

  print("drawing the report...", flush=True)
  try:
    print(f"report: {write_report(folder)}", flush=True)
  except UserError as e:
    # The run itself is done and saved: no reason to fail it.
    print(f"no report: {e}", file=sys.stderr)


def _override(stored: dict[str, Any], extra: list[str]) -> Config:
  """A run's own config with command-line overrides."""
  from moejax.cli import apply_overrides

  config = default_config()
  config.update(stored)
  apply_overrides(config, extra)
  return Config.from_dict(config)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  parser = argparse.ArgumentParser(
    "moejax train",
    description="Train a model, or go on with the run in --workdir.",
  )
  add_config_arguments(parser, required=False)
  add = parser.add_argument
  add("--workdir", metavar="DIR", help="the run's folder; made if missing")
  add(
    "--profile",
    metavar="FIRST:LAST",
    help="steps to record for TensorBoard or XProf, in DIR/profile",
  )
  add(
    "--stop-at",
    type=whole_number,
    metavar="STEP",
    help="save and end after this step; the same command without it goes on "
    "(train.num_steps is the end of the learning rate's schedule too)",
  )
  add(
    "--no-report",
    action="store_true",
    help="draw no page at the end; moejax report does at any time",
  )
  add("--print-config", action="store_true", help="print the resolved config")
  add("--help-config", action="store_true", help="list all config options")
  distributed.add_arguments(parser)
  return parser.parse_known_args(argv)
