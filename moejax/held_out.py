# SPDX-License-Identifier: Apache-2.0
"""What a run is evaluated on while it trains, each at its own interval."""

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping

from moejax import data as data_lib
from moejax.config import Config, EvalSetConfig, phases_of
from moejax.data.tokenizer import Tokenizer
from moejax.errors import ConfigError, UserError
from moejax.evaluate import evaluate_batches, validation_batches
from moejax.runs import Run

# `(run, **arguments) -> numbers by name`, on every process of the run.
Task = Callable[..., Mapping[str, float]]

# The run's own validation rows.
VALIDATION = "validation"


class TaskError(UserError):
  """A task raised, or returned no numbers."""


class HeldOut:
  """The evaluations of `eval`: validation rows, further sets, tasks.

  Stores are opened and tasks imported when it is made: what is missing is said
  before the first step.
  """

  def __init__(self, config: Config, tokenizer: Tokenizer):
    """Args: config, tokenizer: of the run.

    Raises:
      ConfigError: no such task, or one that does not take its arguments.
      DataError: a set whose token store is not there.
    """
    self._config, self._tokenizer = config, tokenizer
    self._sets = {entry.name: entry for entry in config.eval.sets}
    self._tasks = {e.name: _resolve(e) for e in config.eval.sets if e.task}
    self._stores = {
      (entry.name, seq_len): data_lib.open_stores(
        data_lib.held_out_data(phase.config.data, entry), tokenizer
      )
      for entry in config.eval.sets
      if entry.data
      for phase in phases_of(config)
      for seq_len in (phase.config.data.seq_len,)
    }

  def due(self, step: int) -> list[str]:
    """What is to be evaluated after `step` steps; all of it after the last."""
    every = {VALIDATION: self._config.eval.every} | {
      name: entry.every or self._config.eval.every
      for name, entry in self._sets.items()
    }
    at_end = step == self._config.train.num_steps
    return [n for n, e in every.items() if e and (at_end or step % e == 0)]

  def evaluate(self, name: str, run: Run) -> dict[str, float]:
    """Metrics of a set or task, `validation/NAME/...`.

    Args:
      name: of `due`, but for VALIDATION.
      run: the model on its mesh, its weights, and the config of its phase.

    Raises:
      TaskError: says where in the task.
      DataError: a damaged record.
    """
    if name in self._tasks:
      values = _run_task(self._sets[name], self._tasks[name], run)
    else:
      config = run.config
      stores = self._stores[name, config.data.seq_len]
      count = self._sets[name].num_batches or config.eval.num_batches
      rows = validation_batches(config, run.model, stores, count, "train")
      with rows as batches:
        values = evaluate_batches(
          config, run.model, run.variables, batches, self._tokenizer
        )
    return {f"validation/{name}/{key}": value for key, value in values.items()}


def _resolve(entry: EvalSetConfig) -> Task:
  """The function that a task names.

  Raises:
    ConfigError: it cannot be imported, or called so.
  """
  spec = entry.task_spec
  module, _, function = spec.name.rpartition(".")
  where = f"eval.sets: {entry.name}: task {spec.name}"
  if spec.is_of_python:
    raise ConfigError(f"{where} is of Python's own library, which has no tasks")
  try:
    task = getattr(importlib.import_module(module), function)
    inspect.signature(task).bind(None, **spec.kwargs)
  except ModuleNotFoundError as e:
    raise ConfigError(
      f"{where}: {e}; the working directory and the config's folder are "
      "importable"
    ) from e
  except Exception as e:  # whatever a person's module may raise
    raise ConfigError(f"{where}: {type(e).__name__}: {e}") from e
  return task


def _run_task(entry: EvalSetConfig, task: Task, run: Run) -> dict[str, float]:
  try:
    values = task(run, **entry.task_spec.kwargs)
    return {str(key): float(value) for key, value in values.items()}
  except Exception as e:  # whatever a person's code may raise
    frame = traceback.extract_tb(e.__traceback__)[-1]
    message = str(e).split("\n")[0]
    raise TaskError(
      f"task {entry.name} raised {type(e).__name__}: {message} "
      f"({frame.filename}:{frame.lineno})"
    ) from e


def describe_set(name: str, values: Mapping[str, float]) -> str:
  """One line: a text's loss, or the first numbers of a task."""
  start = f"validation/{name}/"
  found = {key.removeprefix(start): value for key, value in values.items()}
  if "bits_per_byte" in found:
    found = {"loss": found["xent"], "bits per byte": found["bits_per_byte"]}
  said = [f"{key} {value:.4g}" for key, value in list(found.items())[:4]]
  return f"{name}: {', '.join(said)}"
