# SPDX-License-Identifier: Apache-2.0
"""The training rows of a run whose phases mix, pack or batch them differently.

Rows of one length and order are a stream: a phase goes on in it where the one
before it stopped, also when another comes between, and no row repeats or is
skipped where weights change. A phase with rows of another length, or with
another `data.order`, reads a stream of its own from its beginning.
"""

import dataclasses
import functools
from typing import Self

from moejax.config import Config, Phase, phases_of
from moejax.data.batches import BatchIterator
from moejax.data.loader import Shards, load_batches
from moejax.data.mixture import Mixture, first_beyond, without_exhausted
from moejax.data.store_set import StoreSet, open_stores
from moejax.data.tokenizer import Tokenizer
from moejax.errors import DataError


@dataclasses.dataclass(frozen=True)
class PhasedStores:
  """The opened stores of each phase.

  Attributes:
    config: of the run.
    stores: of each of `phases_of(config)`.
  """

  config: Config
  stores: tuple[StoreSet, ...]

  @classmethod
  def open(cls, config: Config, tokenizer: Tokenizer) -> Self:
    """Opens and checks the stores of all phases.

    Raises:
      DataError: as `open_stores`; also of phases that come later. Sources that
        run out before the end, where `data.exhausted` is to stop at that.
    """
    opened: dict[tuple, StoreSet] = {}
    for phase in phases_of(config):
      key = phase.config.data.seq_len, phase.config.data.weights
      if key not in opened:
        opened[key] = open_stores(phase.config.data, tokenizer)
    found = (
      opened[phase.config.data.seq_len, phase.config.data.weights]
      for phase in phases_of(config)
    )
    stores = cls(config, tuple(found))
    stores.require_enough()
    return stores

  def require_enough(self) -> None:
    """Refuses a run whose sources end before it does, if they are not repeated.

    Raises:
      DataError: naming the source and the last step that there are rows for.
    """
    for phase in self._phases:
      self._stream(phase)

  def describe_exhausted(self) -> list[str]:
    """A line for each source that is read whole before the run's end."""
    lines, seen = [], set()
    for phase in self._phases:
      if (stream := _stream_of(phase)) in seen:
        continue
      seen.add(stream)
      _, mixture, rows = self._stream(phase)
      counts = mixture.counts(rows)
      for s, count in zip(self.of(phase).stores, counts):
        size = s.rows("train")
        if self.config.data.exhausted == "repeat" and count > size:
          lines.append(f"{s.source} is read {count / size:.2f} times")
        elif self.config.data.exhausted == "reweight" and count == size:
          lines.append(
            f"{s.source} is read whole before the end; the others share its "
            "part from then on"
          )
    return lines

  def number(self, phase: Phase) -> int:
    """Which one of the run's, from 0."""
    return self._phases.index(phase)

  def of(self, phase: Phase) -> StoreSet:
    return self.stores[self.number(phase)]

  @property
  def fingerprints(self) -> list[str]:
    """SHA-256 of what decides the rows of each phase."""
    return [stores.fingerprint for stores in self.stores]

  def batches(
    self, phase: Phase, step: int, shards: Shards | None = None
  ) -> BatchIterator:
    """The phase's training batches, from the one after `step` steps on.

    Args:
      phase: of the run.
      step: of the run, in the phase.
      shards: as in `load_batches`.
    """
    config = phase.config
    first_row, mixture, _ = self._stream(phase)
    return load_batches(
      self.of(phase), config.data, "train", config.train.batch_size,
      config.seed, start_step=step - phase.start, shards=shards,
      mixture=mixture, first_row=first_row,
    )  # fmt: skip

  def rows_read(self, phase: Phase, step: int) -> tuple[int, ...]:
    """Rows of each source that the phase's stream has given after a step."""
    first_row, mixture, _ = self._stream(phase)
    return mixture.counts(
      first_row + (step - phase.start) * phase.config.train.batch_size
    )

  @functools.cached_property
  def _phases(self) -> tuple[Phase, ...]:
    return phases_of(self.config)

  def _stream(self, phase: Phase) -> tuple[int, Mixture, int]:
    """The phase's first row in its stream; the stream's mixture and length."""
    weights: list[tuple[int, tuple[float, ...]]] = []
    first_row = row = 0
    for other, stores in zip(self._phases, self.stores):
      if _stream_of(other) == _stream_of(phase):
        if other == phase:
          first_row = row
        # Shares are exact from where weights change, so not anew in between.
        if not weights or weights[-1][1] != stores.weights:
          weights.append((row, stores.weights))
        row += (other.end - other.start) * other.config.train.batch_size
    exhausted = self.config.data.exhausted
    if exhausted == "repeat":
      return first_row, Mixture(weights), row
    sizes = [s.rows("train") for s in self.of(phase).stores]
    if exhausted == "stop":
      self._require_rows(phase, Mixture(weights), sizes, row)
      return first_row, Mixture(weights), row
    try:
      weights = without_exhausted(weights, sizes, row)
    except ValueError as e:
      step = self._step_of(phase, e.args[1])
      raise DataError(
        f"all sources have been read whole after step {step}: set "
        f"train.num_steps={step}, or data.exhausted=repeat"
      ) from None
    return first_row, Mixture(weights), row

  def _require_rows(
    self, phase: Phase, mixture: Mixture, sizes: list[int], rows: int
  ) -> None:
    """Raises DataError if a source has too few."""
    ends = [
      (row, source)
      for source, size in enumerate(sizes)
      if (row := first_beyond(mixture, source, size, rows)) is not None
    ]
    if ends:
      row, source = min(ends)
      step = self._step_of(phase, row)
      raise DataError(
        f"{self.of(phase).stores[source].source} has {sizes[source]:,} rows, "
        f"which end after step {step}: set train.num_steps={step}, or "
        "data.exhausted=repeat or reweight"
      )

  def _step_of(self, phase: Phase, row: int) -> int:
    """Whole steps before a row of the phase's stream."""
    for other in self._phases:
      if _stream_of(other) == _stream_of(phase):
        size = other.config.train.batch_size
        steps = other.end - other.start
        if row < steps * size:
          return other.start + row // size
        row -= steps * size
    raise ValueError(f"the stream ends before row {row}")


def _stream_of(phase: Phase) -> tuple[int, int]:
  return phase.config.data.seq_len, phase.config.data.order
