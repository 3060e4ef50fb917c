# SPDX-License-Identifier: Apache-2.0
"""The host side of training: read, step, log, evaluate, save, in that order."""

import contextlib
import sys
import time
from typing import Any

import jax
import numpy as np

from moejax import data as data_lib
from moejax import runs
from moejax.checkpoint import Checkpointer, Restored, processes
from moejax.config import Config, Phase, phase_at
from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.evaluate import evaluate, source_names
from moejax.generate import DEFAULT_SAMPLING, can_generate, generate
from moejax.goodput import WAITS, timed
from moejax.hardware import peak_flops
from moejax.held_out import VALIDATION, HeldOut, TaskError, describe_set
from moejax.metrics import SKIPPED, RunLog
from moejax.models import Transformer, build, train_flops_per_token
from moejax.parallel import differing_copies, on_one_device
from moejax.profiling import Profiler, ProfileWindow
from moejax.progress import TrainProgress
from moejax.run_files import RunFiles
from moejax.runlock import PreemptionGuard
from moejax.stability import REASONS
from moejax.step import TrainState, device_batch, shards_of

# Steps between records of the [L, E] expert loads: a picture needs no more.
LOAD_EVERY = 10


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
    models: dict[Phase, Transformer],
    tokenizer: Tokenizer,
    stores: data_lib.PhasedStores,
    checkpoints: Checkpointer,
    files: RunFiles,
    state: TrainState,
    restored: Restored | None,
    held_out: HeldOut,
    profile: ProfileWindow | None = None,
    end: int | None = None,
  ):
    """Args: end: the last step, if not the run's own; all others are its."""
    self.end = config.train.num_steps if end is None else end
    self.dropped_noted = False
    self.config, self.models, self.tokenizer = config, models, tokenizer
    self.stores, self.checkpoints, self.files = stores, checkpoints, files
    self.state = state
    self.step = int(state.step)
    self._enter(phase_at(config, self.step))
    self.held_out = held_out
    self.names = source_names(config)
    self.tokens_seen = restored.meta["tokens_seen"] if restored else 0
    self.tokens_U = np.zeros(len(self.names), np.int64)
    if restored:
      self.tokens_U += np.array(restored.meta["source_tokens"], np.int64)
    self.saved_step = -1
    self.profiler = Profiler(profile, files.folder)
    # Step, metrics, and the rows of its batch, [B, 2]: source, row.
    self.pending: tuple[int, dict[str, Any], np.ndarray] | None = None
    self.times = dict.fromkeys(WAITS, 0.0)

  def run(self, programs: dict[Phase, Any], guard: PreemptionGuard) -> bool:
    """Trains until `end` or a signal; True if a signal came first.

    Args:
      programs: the compiled step of each phase that is left.
      guard: of signals.
    """
    last = self.end
    self.clock = time.perf_counter()
    with (
      RunLog(
        self.files.folder, self.step, jax.process_index() == 0
      ) as self.log,
      TrainProgress(last, self.step) as self.progress,
    ):
      stop = False
      while self.step < last and not stop:
        self._enter(phase_at(self.config, self.step))
        if self.phase.name:
          self.progress.message(describe_phase(self.config, self.phase))
        stop = self._run_phase(programs[self.phase], guard)
      self._log_pending()
      self._say(self.profiler.finish(self.step))
      if self.saved_step != self.step:
        self._save()
      with self._timed("checkpoint"):
        self.checkpoints.wait()
    return self.step < last

  def _enter(self, phase: Phase) -> None:
    self.phase, self.model = phase, self.models[phase]
    self.flops_per_token = train_flops_per_token(
      phase.config.model, phase.config.data.seq_len
    )

  def _run_phase(self, train_step: Any, guard: PreemptionGuard) -> bool:
    """Trains to the phase's end; True if a signal came first."""
    shards = shards_of(self.model, self.phase.config.train.batch_size)
    with self.stores.batches(self.phase, self.step, shards) as batches:
      while self.step < min(self.phase.end, self.end):
        with self._timed("input_wait"):
          batch = next(batches)
        self.profiler.before(self.step + 1)
        self.state, metrics = train_step(
          self.state, device_batch(batch, self.model.placement)
        )
        self._log_pending()
        self.step += 1
        self._say(self.profiler.after(self.step, metrics))
        rows = np.stack([batch["source"], batch["row"]], axis=1)
        self.pending = (self.step, metrics, rows)
        self._after_step()
        if self._should_stop(guard):
          return True
      # What is logged of the last step is of this phase.
      self._log_pending()
    return False

  def _say(self, text: str) -> None:
    if text:
      self.progress.message(text)

  def _after_step(self) -> None:
    config = self.config
    # The end is evaluated before it is saved: a saved run is complete.
    if due := self.held_out.due(self.step):
      self._log_pending()
      self._evaluate(due)
    if self.step % config.checkpoint.every == 0:
      self._log_pending()
      self._save()

  def _should_stop(self, guard: PreemptionGuard) -> bool:
    """After a signal, or a save that failed in the background.

    One of several processes may know of it a step before the others, who would
    wait for it in the next: all stop at one step, and wait for the save there.
    """
    if jax.process_count() == 1:
      self.checkpoints.check()
    elif self.checkpoints.has_failed():
      guard.request()
    return guard.should_stop(self.step)

  def _log_pending(self) -> None:
    """Fetches and logs the step before, while the device works."""
    if self.pending is None:
      return
    step, metrics, rows = self.pending
    self.pending = None
    metrics = jax.device_get(metrics)
    if "load_LE" in metrics:
      load_LE = metrics.pop("load_LE")
      if step % LOAD_EVERY == 0 or step == 1:
        self.log.load(step, load_LE)
    if metrics["skipped"]:
      self._note_skipped(step, metrics, rows)
    self._check_finite(step, metrics)
    self._note_dropped(step, metrics)
    tokens = int(metrics["tokens"])
    self.tokens_seen += tokens
    metrics["tokens"] = self.tokens_seen
    if self.names:
      metrics |= self._of_sources(metrics)
    if self.phase.name:
      metrics["phase"] = self.stores.number(self.phase)
    self.log.step(step, metrics)
    self._log_time(step, tokens, metrics)

  def _of_sources(self, metrics: dict[str, Any]) -> dict[str, Any]:
    """Mean loss of each source's targets, and how many there have been."""
    xent_U, tokens_U = metrics.pop("xent_U"), metrics.pop("tokens_U")
    self.tokens_U += tokens_U.astype(np.int64)
    found = {}
    for name, xent, tokens, total in zip(
      self.names, xent_U, tokens_U, self.tokens_U
    ):
      found[f"sources/{name}/tokens"] = total
      if tokens:
        found[f"sources/{name}/xent"] = xent / tokens
    return found

  def _check_finite(self, step: int, metrics: dict[str, Any]) -> None:
    """Before step n is saved: the parameters after it, and whether to go on."""
    many = metrics.pop("skipped_in_a_row")
    finite = np.isfinite(metrics["param_norm"])
    if finite and many < self.config.stability.max_skipped:
      return
    self.checkpoints.wait()
    newest = self.checkpoints.latest()
    newest = "none" if newest is None else newest
    if not finite:
      raise UserError(
        f"param_norm is {metrics['param_norm']} at step {step} (newest "
        f"checkpoint before it: {newest}); use a lower "
        "optimizer.learning_rate in a new --workdir"
      )
    advice = (
      f"moejax replay {self.files.workdir} --step={step} shows in which layer; "
      "a higher stability.max_skipped goes on over them"
    )
    if step == many:
      advice = "before any update: look at the router or the data"
    raise UserError(
      f"{many} steps in a row were skipped, the last at step {step}: "
      f"{REASONS[int(metrics['skipped'])]} (loss {metrics['loss/total']}, "
      f"grad_norm {metrics['grad_norm']}; newest checkpoint: {newest}); "
      f"{advice}"
    )

  def _note_skipped(
    self, step: int, metrics: dict[str, Any], rows: np.ndarray
  ) -> None:
    """Says why, and which rows it was; all of them are in a log."""
    reason = int(metrics["skipped"])
    # Processes that share rows read the same ones.
    every = dict.fromkeys(map(tuple, processes.from_all(rows).tolist()))
    rows = np.array(list(every))
    self.log.skipped(step, reason, rows)
    stores = self.stores.of(self.phase).stores
    named = [f"{stores[source].source} row {row}" for source, row in rows[:3]]
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    self.progress.message(
      f"step {step} is skipped: {REASONS[reason]} (loss "
      f"{metrics['loss/total']:.4g}, gradient norm "
      f"{metrics['grad_norm']:.4g}); its batch: {', '.join(named)}{more}, all "
      f"in {SKIPPED}"
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
      timing["mfu"] = flops / (peak * self.config.parallel.num_devices)
    self.log.timing(step, timing)
    self.times = dict.fromkeys(self.times, 0.0)
    self.progress.update(
      step, loss=float(metrics["loss/xent"]), tokens_per_second=rate,
      learning_rate=float(metrics["learning_rate"]),
    )  # fmt: skip

  def _evaluate(self, due: list[str]) -> None:
    """Evaluates on what is due; all of it is one line of the log."""
    config, values, failed = self.config, {}, []
    with self._timed("evaluation"):
      if VALIDATION in due:
        values |= self._validate()
      run = runs.Run(
        self.phase.config, self.model, self.state.variables, self.tokenizer,
        self.step,
      )  # fmt: skip
      for name in due:
        if name == VALIDATION:
          continue
        try:
          found = self.held_out.evaluate(name, run)
        except TaskError as e:
          failed.append(str(e))
          continue
        values |= found
        self.progress.message(f"step {self.step}: {describe_set(name, found)}")
      if values:
        self.log.evaluation(self.step, values)
      sample = config.eval.sample_tokens and can_generate(config.model)
      if VALIDATION in due and sample:
        self._sample()
      self.files.publish()
    for problem in failed:
      said = f"step {self.step}: {problem}; training goes on"
      self.progress.message(said)
      if jax.process_index():  # nothing else of it is heard
        print(f"process {jax.process_index()}: {said}", file=sys.stderr)
    if config.eval.task_errors != "stop":
      return
    if due != [VALIDATION] and not processes.all_true(not failed):
      self._save()
      self.checkpoints.wait()
      why = failed[0] if failed else "a task raised on another process"
      raise UserError(f"saved step {self.step}, then stopped: {why}")

  def _validate(self) -> dict[str, float]:
    """Metrics of the validation rows, and of the averaged weights on them."""
    config, stores = self.phase.config, self.stores.of(self.phase)
    values = evaluate(
      config, self.model, self.state.variables, stores, self.tokenizer
    )
    if config.eval.ema:
      averaged = evaluate(
        config, self.model, self.state.averaged, stores, self.tokenizer
      )
      values |= {
        k.replace("validation/", "validation_ema/"): v
        for k, v in averaged.items()
        if not k.startswith("validation/router")
      }
    self.progress.message(
      f"step {self.step}: validation loss {values['validation/xent']:.4f}, "
      f"{values['validation/bits_per_byte']:.3f} bits per byte"
    )
    return values

  def _sample(self) -> None:
    prompt = self.config.eval.sample_prompt
    # One device writes: a mesh would wait for itself at every token.
    variables = on_one_device(self.state.variables)
    if jax.process_index():
      return
    (text,) = generate(
      build(self.phase.config.model), variables, self.tokenizer, [prompt],
      self.config.eval.sample_tokens, DEFAULT_SAMPLING,
    )  # fmt: skip
    self.log.sample(self.step, prompt, text)

  def _check_copies(self) -> None:
    """Devices that hold copies of an array must agree before it is saved."""
    if not self.config.checkpoint.compare_copies:
      return
    if differ := differing_copies(self.state):
      self.checkpoints.wait()
      more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
      raise UserError(
        f"devices hold different copies of {differ[0]}{more} after step "
        f"{self.step}: a device or its memory is faulty; the step is not saved "
        f"(newest checkpoint: {self.checkpoints.latest()}). Leave that machine "
        "out, and run the same command to go on"
      )

  def _save(self) -> None:
    with self._timed("checkpoint"):
      self._check_copies()
      # Log lines first: a checkpoint of step n promises lines 1..n.
      self.log.flush()
      meta = {
        "step": self.step,
        "tokens_seen": self.tokens_seen,
        "source_tokens": self.tokens_U.tolist(),
        "config": self.config.to_dict(),
        "tokenizer": self.tokenizer.digest,
        "data": self.stores.fingerprints,
        "versions": runs.versions(),
        "git_commit": runs.git_commit(),
      }
      self.checkpoints.save(self.step, self.state, meta)
      self.saved_step = self.step

  def _timed(self, name: str) -> contextlib.AbstractContextManager[None]:
    return timed(self.times, name)


def describe_phase(config: Config, phase: Phase) -> str:
  """One line: which steps, and what it sets."""
  (options,) = (p.options for p in config.train.phases if p.name == phase.name)
  said = ", ".join(f"{path}={value}" for path, value in options)
  steps = f"steps {phase.start + 1:,} to {phase.end:,}"
  return f"phase {phase.name}: {steps}; {said or 'the config as it is'}"
