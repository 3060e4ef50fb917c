# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a command names, and whether they can be compared."""

import collections
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from moejax import runs
from moejax.checkpoint import CheckpointReader
from moejax.config import Config, ModelConfig, ParallelConfig
from moejax.errors import CheckpointError, ConfigError, UserError
from moejax.init_from import changed_meaning
from moejax.run_files import fetched
from moejax.runs import Run


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """One step in the folder of a run, trained or converted."""

  folder: Path
  step: int
  parallel: ParallelConfig | None = None  # the mesh to load it on

  def __str__(self) -> str:
    return f"{self.folder}:{self.step}"

  def load(self) -> Run:
    """The model, its weights and its tokenizer."""
    return runs.load_run(self.folder, self.step, self.parallel)


def load(name: str | os.PathLike) -> Run:
  """The checkpoint of a name: RUN (its newest step), RUN:step or RUN/step.

  Raises:
    UserError: no such run or step, or a model without routers.
  """
  (checkpoint,) = find([os.fspath(name)])
  return checkpoint.load()


def find(
  names: Sequence[str], parallel: ParallelConfig | None = None
) -> list[Checkpoint]:
  """The checkpoints of names, also `RUN:all`; those of one run by step.

  Args:
    names: RUN, RUN:step, RUN/step or RUN:all.
    parallel: the mesh that each will be loaded on; None is one device.

  Raises:
    UserError: no such run or step.
    ConfigError: two different models, or one without routers.
  """
  found = [checkpoint for name in names for checkpoint in _named(name)]
  found = list(dict.fromkeys(found))
  if len({checkpoint.folder for checkpoint in found}) == 1:
    found.sort(key=lambda checkpoint: checkpoint.step)
  last = found[-1].folder
  config = runs.read_config(last)
  if not router_names(config.model):
    raise ConfigError(
      f"{last} has no MoE layer, so there is no routing to analyse; name a run "
      "whose model.pattern has moe or moa"
    )
  for folder in dict.fromkeys(checkpoint.folder for checkpoint in found):
    _require_same_model(folder, last, config)
  return [dataclasses.replace(c, parallel=parallel) for c in found]


def names_of(checkpoints: Sequence[Checkpoint]) -> list[str]:
  """What to call each: its step, and where there are several runs, its run."""
  folders = collections.Counter(c.folder for c in checkpoints)
  if len(folders) == 1:
    return [step_label(c.step) for c in checkpoints]
  runs_of = {folder: run_name(folder) for folder in folders}
  if len(set(runs_of.values())) < len(folders):
    runs_of = {folder: str(folder) for folder in folders}
  return [
    runs_of[c.folder]
    + (f", {step_label(c.step)}" if folders[c.folder] > 1 else "")
    for c in checkpoints
  ]


def step_label(step: int) -> str:
  """`step 1,000`."""
  return f"step {step:,}"


def run_name(folder: Path) -> str:
  """Its folder's, with the one above for a sweep's `seed_0`."""
  folder = folder.resolve()
  if re.fullmatch(r"seed_\d+", folder.name):
    return f"{folder.parent.name}/{folder.name}"
  return folder.name


def router_names(config: ModelConfig) -> tuple[str, ...]:
  """What to call each router, in the order of `ModelOutput.stats`."""
  names = []
  for i, layer in enumerate(config.layers):
    names += [f"layer {i} attention"] if layer.mixer == "moa" else []
    names += [f"layer {i}"] if layer.ffn == "moe" else []
  return tuple(names)


def _named(name: str) -> list[Checkpoint]:
  """The checkpoints that one name stands for."""
  path = Path(name)
  if _is_run(path):
    return [Checkpoint(path, _newest(path))]
  folder = path.parent
  if folder.name == runs.checkpoint_folder("").name:
    folder = folder.parent
  if _is_number(path.name) and _is_run(folder):
    return [_at(folder, int(path.name))]
  text, colon, step = name.rpartition(":")
  if colon and step == "all":
    folder = Path(text)
    runs.read_config(folder)  # says what is wrong with a folder that is no run
    steps = _reader(folder).steps() or [_newest(folder)]
    return [Checkpoint(folder, number) for number in steps]
  if colon and _is_number(step):
    runs.read_config(text)
    return [_at(Path(text), int(step))]
  runs.read_config(path)
  return [Checkpoint(path, _newest(path))]


def _is_number(text: str) -> bool:
  """Whether `int` reads it, in ASCII digits alone."""
  return text.isascii() and text.isdecimal()


def _is_run(folder: Path) -> bool:
  return (fetched(folder) / "config.json").is_file()


def _reader(folder: Path) -> CheckpointReader:
  return CheckpointReader(runs.checkpoint_folder(folder))


def _newest(folder: Path) -> int:
  step = _reader(folder).latest()
  if step is None:
    raise CheckpointError(f"no checkpoint in {folder}")
  return step


def _at(folder: Path, step: int) -> Checkpoint:
  steps = _reader(folder).steps()
  if step not in steps:
    listed = ", ".join(map(str, steps)) if steps else "none"
    raise CheckpointError(
      f"no checkpoint of step {step} in {folder}; available steps: {listed}"
    )
  return Checkpoint(folder, step)


def _require_same_model(folder: Path, last: Path, config: Config) -> None:
  if folder == last:
    return
  changed = changed_meaning(runs.read_config(folder), config)
  if changed:
    raise ConfigError(
      f"{folder} and {last} are different models ({'; '.join(changed)}); "
      "analyse them one by one"
    )
  digests = {runs.read_tokenizer(path).digest for path in (folder, last)}
  if len(digests) > 1:
    raise UserError(
      f"{folder} and {last} have different tokenizers, so their tokens cannot "
      "be compared; analyse them one by one"
    )
