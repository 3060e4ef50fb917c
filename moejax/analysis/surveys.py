# SPDX-License-Identifier: Apache-2.0
"""One pass of a checkpoint over the text, and comparison with the last one.

The last checkpoint's choices are kept in a file, a bit an expert: so one model
is in memory at a time, and each reads the text once. `M` counts checkpoints.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis import counts, text
from moejax.analysis.checkpoints import (
  Checkpoint,
  names_of,
  router_names,
  step_label,
)
from moejax.analysis.counts import Tally, Words
from moejax.analysis.text import Batch
from moejax.config import DataConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import ConfigError
from moejax.memory import require_memory
from moejax.progress import format_count, progress_bar
from moejax.routing import Choices
from moejax.runs import Run
from moejax.step import device_batch

# Tokens of a batch where nothing else is said.
_BATCH_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Overlap:
  """How the choices of a checkpoint agree with those of the last one.

  Attributes:
    same_L: pairs (token, expert) that both chose.
    wanted_L: pairs that the last one chose.
    top_L: tokens with the same best expert.
    top_wanted_L: tokens that have one in the last.
  """

  same_L: np.ndarray
  wanted_L: np.ndarray
  top_L: np.ndarray
  top_wanted_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class Survey:
  """What the routers of one checkpoint did.

  Attributes:
    step: of the checkpoint.
    routers: their names in order, `layer 3` or `layer 3 attention`.
    num_experts: E.
    domains: sums by the name of the text.
    words: sums by token id; None where they were left out.
    overlap: with the last checkpoint; None for the last itself.
    name: what to call the checkpoint beside others; "" takes its step.
  """

  step: int
  routers: tuple[str, ...]
  num_experts: int
  domains: dict[str, Tally]
  words: Words | None = None
  overlap: Overlap | None = None
  name: str = ""

  @property
  def label(self) -> str:
    """Its name, or `step 1,000`."""
    return self.name or step_label(self.step)

  @property
  def total(self) -> Tally:
    """Of all domains together."""
    return counts.sum_of(self.domains.values())


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which text is read, and how.

  Attributes:
    domains: sources by name.
    tokens: at most so many, as many of each domain.
    batch_size: rows of a batch; 0 takes what makes about 4,096 tokens.
    sample: tokens on which `similarity` compares what experts compute.
    parts: into which a mesh divides the rows of a batch.
  """

  domains: text.Domains
  tokens: int = 1_000_000
  batch_size: int = 0
  sample: int = 256
  parts: int = 1

  def __post_init__(self):
    if not 0 < self.tokens <= counts.MAX_TOKENS:
      raise ConfigError(
        f"--tokens={self.tokens} is not in [1, {counts.MAX_TOKENS}]"
      )
    if self.batch_size < 0:
      raise ConfigError(f"--batch-size={self.batch_size} is negative")
    if self.batch_size % self.parts:
      raise ConfigError(
        f"--batch-size={self.batch_size} does not divide into the mesh's "
        f"{self.parts} parts"
      )
    if self.sample < 1:
      raise ConfigError(f"--sample={self.sample} must be positive")

  def num_rows(self, config: DataConfig) -> int:
    """Windows of each domain.

    Raises:
      ConfigError: `tokens` allows none.
    """
    count, window = len(self.domains), config.seq_len
    if self.tokens < count * window:
      raise ConfigError(
        f"--tokens={self.tokens} is less than a window of "
        f"data.seq_len={window} for each domain; give at least {count * window}"
      )
    return self.tokens // count // window

  def batches(
    self, tokenizer: Tokenizer, config: DataConfig
  ) -> Iterator[tuple[str, Batch]]:
    """Batches with the name of their domain, the same at each call.

    Args:
      tokenizer: the model's.
      config: how text is read, in windows of its `seq_len`.
    """
    for name in self.domains:
      for batch in self.batches_of(name, tokenizer, config):
        yield name, batch

  def batches_of(
    self, name: str, tokenizer: Tokenizer, config: DataConfig
  ) -> Iterator[Batch]:
    """Batches of one domain."""
    rows = self.num_rows(config)
    size = self.batch_size or max(1, _BATCH_TOKENS // config.seq_len)
    # What the last part lacks is padding.
    size = -(-min(size, rows) // self.parts) * self.parts
    return text.batches(self.domains[name], tokenizer, config, size, rows)


class ChoiceFile:
  """The last checkpoint's choices, batch by batch in a nameless file."""

  def __init__(self, folder: str | os.PathLike | None = None):
    self._file = tempfile.TemporaryFile(dir=folder)

  def append(self, made: Choices) -> None:
    packed, top = pack(made)
    np.save(self._file, np.asarray(packed), allow_pickle=False)
    np.save(self._file, np.asarray(top), allow_pickle=False)

  def read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(packed, top) of each batch, from the first."""
    self._file.seek(0)
    end = os.fstat(self._file.fileno()).st_size
    while self._file.tell() < end:
      yield np.load(self._file), np.load(self._file)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: Any) -> None:
    self._file.close()


def survey(
  run: Run,
  plan: Plan,
  *,
  keep: ChoiceFile | None = None,
  against: ChoiceFile | None = None,
  words: bool = True,
  config: DataConfig | None = None,
  name: str = "",
) -> Survey:
  """Watches a checkpoint's routers on the plan's text.

  Args:
    run: as `analysis.load` returns it.
    plan: the text.
    keep: gets the choices, for a later `against`.
    against: choices of the last checkpoint on the same plan.
    words: whether to count by token id.
    config: how text is read; None is the run's own `data`. Checkpoints can be
      compared if all are given the same.
    name: what to call the checkpoint; "" takes its step.

  Raises:
    DataError: the text is missing, unreadable or empty.
    ConfigError: the counts by token id do not fit into memory, or `against` is
      of other batches.
  """
  model, names = run.model, router_names(run.config.model)
  sizes = len(names), run.config.model.moe.num_experts
  tallies: dict[str, Tally] = {}
  table = _empty_words(run, sizes) if words else None
  earlier = _Earlier(against, run.step) if against else None
  onto_host = _OntoHost(keep)
  with progress_bar(f"step {run.step}, tokens", None, sys.stderr) as bar:
    bar.advance(0)  # compiling comes first
    for domain, batch in plan.batches(run.tokenizer, config or run.config.data):
      known = domain in tallies
      tally = tallies[domain] if known else counts.zero_tally(*sizes)
      tallies[domain], table, more_L, made = counts.add_batch(
        model, run.variables, device_batch(batch, model.placement), tally, table
      )
      overlap = earlier.overlap(made) if earlier else None
      onto_host.add(domain, more_L, made, overlap)
      bar.advance(int((batch["segment_ids"] > 0).sum()))
    onto_host.finish()
    if earlier:
      earlier.finish()
  return Survey(
    run.step, names, sizes[1],
    {domain: counts.on_host(tally, onto_host.entropy[domain])
     for domain, tally in tallies.items()},
    None if table is None else jax.device_get(table),
    Overlap(*onto_host.overlap) if against else None,
    name,
  )  # fmt: skip


class _Earlier:
  """The last checkpoint's choices, for the same batches in turn."""

  def __init__(self, kept: ChoiceFile, step: int):
    self._choices, self._step = kept.read(), step

  def overlap(self, made: Choices) -> jax.Array:
    packed, top = next(self._choices, (None, None))
    self._require(top is not None and top.shape == made.top_BT.shape)
    return overlap_sums(made, packed, top)

  def finish(self) -> None:
    self._require(next(self._choices, None) is None)

  def _require(self, same: bool) -> None:
    if not same:
      raise ConfigError(
        f"step {self._step} read other batches than the checkpoint it is "
        "compared with; give `survey` the same plan and config for both"
      )


class _OntoHost:
  """Fetches what each batch gave, one batch late: the device does not wait."""

  def __init__(self, keep: ChoiceFile | None):
    self.entropy: dict[str, np.ndarray] = {}
    self.overlap: np.ndarray | int = 0
    self._keep = keep
    self._waiting: tuple[Any, ...] | None = None

  def add(self, *results: Any) -> None:
    self.finish()
    self._waiting = results

  def finish(self) -> None:
    if self._waiting is None:
      return
    name, more_L, made, overlap = self._waiting
    self._waiting = None
    more_L = np.asarray(more_L, np.float64)
    known = name in self.entropy
    self.entropy[name] = self.entropy[name] + more_L if known else more_L
    if self._keep is not None:
      self._keep.append(made)
    if overlap is not None:
      self.overlap += np.asarray(overlap, np.int64)


def survey_all(
  checkpoints: Sequence[Checkpoint], plan: Plan, folder: str | None
) -> list[Survey]:
  """Of each checkpoint, with what it shares with the last one.

  All read the text as the last one's run does, whatever their own `data` says.

  Args:
    checkpoints: the last is what others are compared with.
    plan: the text.
    folder: where choices of the last one are kept meanwhile, with a bit for
      each token, router and expert; None takes the system's own place.
  """
  with contextlib.ExitStack() as stack:
    kept = None
    if len(checkpoints) > 1:
      kept = stack.enter_context(ChoiceFile(folder))
    last = checkpoints[-1].load()
    config = last.config.data
    *names, name = names_of(checkpoints)
    found = [survey(last, plan, keep=kept, name=name)]
    del last  # one model at a time
    others = {"against": kept, "words": False, "config": config}
    for checkpoint, name in zip(checkpoints[-2::-1], names[::-1]):
      found.insert(0, survey(checkpoint.load(), plan, name=name, **others))
  return found


def _empty_words(run: Run, sizes: tuple[int, int]) -> Words:
  V = run.config.model.vocab_size
  require_memory(
    Words.bytes_of(V, *sizes),
    f"counts of {format_count(V)} ids x {sizes[0]} routers x {sizes[1]} "
    "experts",
    "use a machine with more",
  )
  return Words.empty(V, *sizes)


@jax.jit
def pack(made: Choices) -> tuple[jax.Array, jax.Array]:
  """A bit for each expert, and the best one."""
  packed = jnp.packbits(made.chosen_BTE, axis=-1)
  return packed, made.top_BT.astype(jnp.int16)


@jax.jit
def overlap_sums(made: Choices, packed: jax.Array, top: jax.Array) -> jax.Array:
  """[4, L] sums of one batch, as `Overlap` has them."""
  E = made.chosen_BTE.shape[-1]
  wanted = jnp.unpackbits(packed, axis=-1, count=E).astype(bool)
  there = top < E
  of_pairs = lambda x: x.sum((1, 2, 3), dtype=jnp.int32)
  of_tokens = lambda x: x.sum((1, 2), dtype=jnp.int32)
  return jnp.stack([
    of_pairs(made.chosen_BTE & wanted), of_pairs(wanted),
    of_tokens((made.top_BT == top) & there), of_tokens(there),
  ])  # fmt: skip
