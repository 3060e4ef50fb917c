# SPDX-License-Identifier: Apache-2.0
"""Training: config -> data -> model -> step -> logs, evaluations, checkpoints.

A run is its folder. Started again with the same folder, it goes on from its
newest valid checkpoint and ends with the same bytes as if never stopped.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import data as data_lib
from moejax import runs
from moejax.checkpoint import Checkpointer, Restored
from moejax.cli import add_config_arguments, parse_config
from moejax.config import Config, default_config, describe_options
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.errors import ConfigError, DataError, UserError
from moejax.evaluate import evaluate
from moejax.generate import DEFAULT_SAMPLING, generate
from moejax.hardware import keep_freed_memory, peak_flops
from moejax.init_from import weights_of
from moejax.memory import check_state_fits, compile_step
from moejax.metrics import RunLog
from moejax.models import Transformer, build, count, train_flops_per_token
from moejax.models.transformer import describe_backends
from moejax.progress import TrainProgress
from moejax.resume import how_to_go_on, refuse_converted, restore_or_none
from moejax.runlock import EXIT_SAVED, PreemptionGuard, RunLock
from moejax.step import TrainState, device_batch, init_state


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
  return train(config, args.workdir)


def train(config: Config, workdir: str | os.PathLike) -> int:
  """Trains to `train.num_steps`, from the newest checkpoint if there is one.

  Returns:
    0 when finished, `EXIT_SAVED` when stopped by SIGTERM or SIGINT after
    saving; the same command then goes on.

  Raises:
    UserError: anything that a person can fix; nothing is half-written.
  """
  workdir = Path(workdir)
  keep_freed_memory()
  # Before anything is written: what is wrong with the data or the config.
  refuse_converted(workdir)
  tokenizer = load_tokenizer_of(config)
  stores = data_lib.open_stores(config.data, tokenizer)
  if config.eval.every and not stores.rows("validation"):
    raise DataError(
      "no validation rows: raise data.validation_fraction and prepare again, "
      "or set eval.every=0"
    )
  check_state_fits(config)
  model = build(config.model)
  jax.eval_shape(lambda: init_state(config, model))
  with RunLock(workdir), PreemptionGuard() as guard:
    with runs.open_checkpoints(workdir, config) as checkpoints:
      restored = restore_or_none(config, model, checkpoints, tokenizer, stores)
      state = (
        restored.state if restored else _fresh_state(config, model, tokenizer)
      )
      start = int(state.step)
      announce(config, model, stores, workdir, start)
      if start >= config.train.num_steps:
        print(f"already trained to step {start}; {how_to_go_on(config)}")
        runs.write_files(workdir, config, tokenizer)
        _report(workdir)
        return 0
      loop = Loop(
        config, model, tokenizer, stores, checkpoints, workdir, state, restored
      )
      train_step = compile_step(config, model)
      runs.write_files(workdir, config, tokenizer)
      stopped = loop.run(train_step, guard)
    _report(workdir)
  if stopped:
    print(f"stopped at step {loop.step}, saved; run the same command to go on")
    return EXIT_SAVED
  return 0


class Loop:
  """The host side of training: order of saving, reading, stepping, logging.

  Everything that belongs to step n (its metrics line, its evaluation, its
  checkpoint) is done before the batch of step n + 1 is drawn, so a checkpoint
  and its data position always agree. Metrics alone are fetched one step late,
  while the device already works on the next.
  """

  def __init__(
    self,
    config: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    stores: Any,
    checkpoints: Checkpointer,
    workdir: Path,
    state: TrainState,
    restored: Restored | None,
  ):
    self.dropped_noted = False
    self.config, self.model, self.tokenizer = config, model, tokenizer
    self.stores, self.checkpoints, self.workdir = stores, checkpoints, workdir
    self.state = state
    self.step = int(state.step)
    self.tokens_seen = restored.meta["tokens_seen"] if restored else 0
    self.flops_per_token = train_flops_per_token(
      config.model, config.data.seq_len
    )
    self.saved_step = -1
    self.pending: tuple[int, dict[str, Any]] | None = None
    self.times = {"input_wait": 0.0, "checkpoint": 0.0, "evaluation": 0.0}
    self.clock = time.perf_counter()

  def run(self, train_step, guard: PreemptionGuard) -> bool:
    """Trains until the end or a signal; True if a signal came first."""
    config = self.config
    last = config.train.num_steps
    batches = data_lib.load_batches(
      self.stores, config.data, "train", config.train.batch_size, config.seed,
      start_step=self.step,
    )  # fmt: skip
    with (
      batches,
      RunLog(self.workdir, self.step) as self.log,
      TrainProgress(last, self.step) as self.progress,
    ):
      stop = False
      while self.step < last and not stop:
        with self._timed("input_wait"):
          batch = next(batches)
        self.state, metrics = train_step(self.state, device_batch(batch))
        self._log_pending()
        self.step += 1
        self.pending = (self.step, metrics)
        self._after_step()
        stop = guard.should_stop(self.step)
      self._log_pending()
      if self.saved_step != self.step:
        self._save()
      self.checkpoints.wait()
    return self.step < last

  def _after_step(self) -> None:
    config = self.config
    # The end is evaluated before it is saved: a saved run is complete.
    at_end = self.step == config.train.num_steps
    if at_end or _due(config.eval.every, self.step):
      self._log_pending()
      self._evaluate()
    if _due(config.checkpoint.every, self.step):
      self._log_pending()
      self._save()
    self.checkpoints.check()

  def _log_pending(self) -> None:
    """Fetches and logs the step before, while the device works."""
    if self.pending is None:
      return
    step, metrics = self.pending
    self.pending = None
    metrics = jax.device_get(metrics)
    if "load_LE" in metrics:
      load_LE = metrics.pop("load_LE")
      if step % LOAD_EVERY == 0 or step == 1:
        self.log.load(step, load_LE)
    self._check_finite(step, metrics)
    self._note_dropped(step, metrics)
    tokens = int(metrics["tokens"])
    self.tokens_seen += tokens
    metrics["tokens"] = self.tokens_seen
    self.log.step(step, metrics)
    self._log_time(step, tokens, metrics)

  def _check_finite(self, step: int, metrics: dict[str, Any]) -> None:
    """Before step n is saved: loss and gradient of it, parameters after it."""
    for name in ("loss/total", "grad_norm", "param_norm"):
      if not np.isfinite(metrics[name]):
        self.checkpoints.wait()
        newest = self.checkpoints.latest()
        raise UserError(
          f"{name} is {metrics[name]} at step {step} (newest checkpoint before "
          f"it: {newest}); use a lower optimizer.learning_rate in a new "
          "--workdir, or look at the data of this step"
        )

  def _note_dropped(self, step: int, metrics: dict[str, Any]) -> None:
    """Says once that assignments went nowhere; the metrics have them all."""
    if self.dropped_noted or "router/dropped" not in metrics:
      return
    if not metrics["router/dropped"]:
      return
    self.dropped_noted = True
    self.progress.message(
      f"note: {float(metrics['router/dropped']):.1%} of step {step}'s "
      "assignments went to no expert; the metric router/dropped has every step"
    )

  def _log_time(self, step: int, tokens: int, metrics: dict[str, Any]) -> None:
    now = time.perf_counter()
    seconds, self.clock = now - self.clock, now
    computing = max(
      seconds - self.times["checkpoint"] - self.times["evaluation"], 1e-9
    )
    rate = tokens / computing
    flops = rate * self.flops_per_token
    peak = peak_flops(jax.devices()[0])
    timing = {
      "seconds": seconds,
      "tokens_per_second": rate,
      "model_flops_per_second": flops,
      "wall_time": time.time(),
      **self.times,
    }
    if peak:
      timing["mfu"] = flops / (peak * jax.device_count())
    self.log.timing(step, timing)
    self.times = dict.fromkeys(self.times, 0.0)
    self.progress.update(
      step, loss=float(metrics["loss/xent"]), tokens_per_second=rate,
      learning_rate=float(metrics["learning_rate"]),
    )  # fmt: skip

  def _evaluate(self) -> None:
    config = self.config
    if not config.eval.every:
      return
    with self._timed("evaluation"):
      values = evaluate(
        config, self.model, self.state.variables, self.stores, self.tokenizer
      )
      self.log.evaluation(self.step, values)
      self.progress.message(
        f"step {self.step}: validation loss {values['validation/xent']:.4f}, "
        f"{values['validation/bits_per_byte']:.3f} bits per byte"
      )
      if config.eval.sample_tokens:
        self._sample()

  def _sample(self) -> None:
    prompt = self.config.eval.sample_prompt
    (text,) = generate(
      self.model, self.state.variables, self.tokenizer, [prompt],
      self.config.eval.sample_tokens, DEFAULT_SAMPLING,
    )  # fmt: skip
    self.log.sample(self.step, prompt, text)

  def _save(self) -> None:
    with self._timed("checkpoint"):
      # Log lines first: a checkpoint of step n promises lines 1..n.
      self.log.flush()
      meta = {
        "step": self.step,
        "tokens_seen": self.tokens_seen,
        "config": self.config.to_dict(),
        "tokenizer": self.tokenizer.digest,
        "data": self.stores.fingerprint,
        "versions": runs.versions(),
        "git_commit": runs.git_commit(),
      }
      self.checkpoints.save(self.step, self.state, meta)
      self.saved_step = self.step

  def _timed(self, name: str) -> "_Timer":
    return _Timer(self.times, name)


# Steps between records of the [L, E] expert loads: a picture needs no more.
LOAD_EVERY = 10


class _Timer:
  """Adds the seconds of a `with` block to an entry."""

  def __init__(self, times: dict[str, float], name: str):
    self._times, self._name = times, name

  def __enter__(self) -> None:
    self._start = time.perf_counter()

  def __exit__(self, *exc_info) -> None:
    self._times[self._name] += time.perf_counter() - self._start


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
  config: Config, model: Transformer, stores: Any, workdir: Path, start: int
) -> None:
  """Prints what runs where, once."""
  counts = count(config.model)
  tokens = config.train.batch_size * config.data.seq_len
  print(
    f"model: {counts.num_params:,} parameters, {counts.num_active_params:,} "
    f"active per token; {config.model.num_layers} layers"
  )
  print(
    f"data: {stores.describe()}; {tokens:,} tokens a batch, "
    f"{config.train.num_steps} steps"
  )
  unseen = [s.source for s in stores.stores if not s.rows("validation")]
  if config.eval.every and unseen:
    print(f"note: validation has no rows of {', '.join(unseen)}")
  for line in describe_backends(model, config.data.seq_len):
    print(line)
  if jax.device_count() > 1:
    print(
      f"note: this run uses one of {jax.device_count()} devices",
      file=sys.stderr,
    )
  verb = f"goes on at step {start}" if start else "starts"
  print(f"{workdir}: {verb}; compiling the step...", flush=True)


def _fresh_state(
  config: Config, model: Transformer, tokenizer: Tokenizer
) -> TrainState:
  state = jax.jit(lambda: init_state(config, model))()
  if not config.train.init_from:
    return state
  return state.replace(**weights_of(config, tokenizer))


def _due(every: int, step: int) -> bool:
  return every > 0 and step % every == 0


def _report(workdir: Path) -> None:
  from moejax.report import write_report

  print("drawing the report...", flush=True)
  try:
    print(f"report: {write_report(workdir)}", flush=True)
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
  add("--print-config", action="store_true", help="print the resolved config")
  add("--help-config", action="store_true", help="list all config options")
  return parser.parse_known_args(argv)
