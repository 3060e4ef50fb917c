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
from moejax.data.loader import BatchIterator, Shards, load_batches
from moejax.data.mixture import Mixture
from moejax.data.store_set import StoreSet, open_stores
from moejax.data.tokenizer import Tokenizer


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
      DataError: as `open_stores`; also of phases that come later.
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
    return cls(config, tuple(found))

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
    first_row, mixture = self._stream(phase)
    return load_batches(
      self.of(phase), config.data, "train", config.train.batch_size,
      config.seed, start_step=step - phase.start, shards=shards,
      mixture=mixture, first_row=first_row,
    )  # fmt: skip

  def rows_read(self, phase: Phase, step: int) -> tuple[int, ...]:
    """Rows of each source that the phase's stream has given after a step."""
    first_row, mixture = self._stream(phase)
    return mixture.counts(
      first_row + (step - phase.start) * phase.config.train.batch_size
    )

  @functools.cached_property
  def _phases(self) -> tuple[Phase, ...]:
    return phases_of(self.config)

  def _stream(self, phase: Phase) -> tuple[int, Mixture]:
    """The phase's first row in its stream, and the stream's mixture."""
    weights: list[tuple[int, tuple[float, ...]]] = []
    first_row = row = 0
    for other, stores in zip(self._phases, self.stores):
      if _stream_of(other) == _stream_of(phase):
        if other == phase:
          first_row = row
        weights.append((row, stores.weights))
        row += (other.end - other.start) * other.config.train.batch_size
    return first_row, Mixture(weights)


def _stream_of(phase: Phase) -> tuple[int, int]:
  return phase.config.data.seq_len, phase.config.data.order
