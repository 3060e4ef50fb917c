# SPDX-License-Identifier: Apache-2.0
"""Batches from token stores: a function of the seed and the step alone.

Global batch `n` is rows [n*B, (n+1)*B) of the mixture, in that order, however
many processes share it and however they read. So the data position of a run is
its step, and going on from it costs nothing.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np

from moejax.config import DataConfig
from moejax.data import packing, sources, store
from moejax.data.batches import BatchIterator, as_batch, as_element
from moejax.data.mixture import Mixture
from moejax.data.store_set import Batch, StoreSet
from moejax.data.tokenizer import Tokenizer
from moejax.errors import DataError

logger = logging.getLogger(__name__)

# Reading is short work under the interpreter lock: more threads do not help.
_THREADS = 2
# Validation rows are always drawn in the same order.
_VALIDATION_SEED = 0


@dataclasses.dataclass(frozen=True)
class Shards:
  """How the rows of a global batch are dealt to those who read them.

  Attributes:
    index: of this process's shard.
    rows: of each shard, its rows within the batch; as many in each, and each
      row in one.
  """

  index: int
  rows: tuple[tuple[int, ...], ...]

  @classmethod
  def even(cls, batch_size: int, index: int = 0, count: int = 1) -> Self:
    """`count` stretches of neighbouring rows.

    Raises:
      ValueError: they do not divide.
    """
    if batch_size % count:
      raise ValueError(f"{batch_size} rows do not divide by {count} shards")
    size = batch_size // count
    stretches = (range(i * size, (i + 1) * size) for i in range(count))
    return cls(index, tuple(map(tuple, stretches)))

  @property
  def mine(self) -> tuple[int, ...]:
    return self.rows[self.index]

  @property
  def batch_size(self) -> int:
    return sum(map(len, self.rows))


def load_batches(
  stores: StoreSet,
  config: DataConfig,
  split: str,
  batch_size: int,
  seed: int,
  *,
  start_step: int = 0,
  shards: Shards | None = None,
  mixture: Mixture | None = None,
  first_row: int = 0,
) -> BatchIterator:
  """Endless training batches, from step `start_step` on.

  Args:
    stores: as `open_stores` returns them.
    config: `num_workers` and `prefetch_rows` decide how to read, never what.
    split: `train` or `validation`.
    batch_size: rows of the global batch.
    seed: of the order; each source is shuffled anew in each of its epochs.
    start_step: the first batch to return.
    shards: which rows of each batch this process returns; None: all.
    mixture: of the sources; None takes the stores' weights for all rows.
    first_row: of batch 0 in the mixture.

  Raises:
    DataError: a source has no rows in this split; while iterating: a damaged
      record, or an id outside the vocabulary.
  """
  shards = shards or Shards.even(batch_size)
  for s, weight in zip(stores.stores, stores.weights):
    if weight and not s.rows(split):
      raise DataError(f"{s.source} has no {split} rows; see {s.folder}")
  import grain
  import grain.experimental

  numbers = range(len(stores.stores))
  rows = [_rows(stores, n, split, seed, config.order) for n in numbers]
  dataset = grain.MapDataset.select_from_datasets(
    [of_source.repeat(None) for of_source in rows],
    _ByShard(mixture or Mixture([(0, stores.weights)]), shards, first_row),
  )
  ahead = max(1, config.prefetch_rows // len(shards.mine))
  workers = None
  if config.num_workers:
    _allow_workers()
    workers = grain.MultiprocessingOptions(
      num_workers=config.num_workers, per_worker_buffer_size=ahead
    )
  iterator = iter(
    grain.experimental.ElasticIterator(
      dataset,
      batch_size,
      grain.sharding.ShardOptions(shards.index, len(shards.rows)),
      read_options=grain.ReadOptions(min(_THREADS, ahead), ahead),
      multiprocessing_options=workers,
    )
  )
  iterator.set_state({"global_next_index": start_step * batch_size})
  return BatchIterator(iterator, stores, split, config.timeout)


def validation_batches(
  stores: StoreSet,
  batch_size: int,
  num_batches: int | None = None,
  *,
  split: str = "validation",
  shards: Shards | None = None,
  timeout: float = DataConfig.timeout,
) -> BatchIterator:
  """Validation rows once, in an order that never changes.

  The sources are mixed in proportion to their rows, so that the first batches
  are a sample of all. Rows that the last batch lacks are padding: segment 0, no
  loss. So shapes stay the same.

  Args:
    stores: as `open_stores` returns them.
    batch_size: rows of the global batch.
    num_batches: at most so many; None is all.
    split: whose rows.
    shards: as in `load_batches`.
    timeout: seconds that a batch may take to come.

  Raises:
    DataError: there are no such rows; while iterating: as `load_batches`.
  """
  shards = shards or Shards.even(batch_size)
  total = stores.rows(split)
  if not total:
    raise DataError(
      "no validation rows: prepare again with more documents or a larger "
      "data.validation_fraction; train without evaluation by eval.every=0; "
      "evaluate a run on files by moejax eval RUN --data FILE"
    )
  sizes = [float(s.rows(split)) for s in stores.stores]
  mixture = Mixture([(0, sizes)])
  rows = [
    _rows(stores, number, split, _VALIDATION_SEED)
    for number in range(len(stores.stores))
  ]
  count = math.ceil(total / batch_size)
  count = count if num_batches is None else min(count, num_batches)

  def batches() -> Iterator[np.ndarray]:
    for step in range(count):
      numbers = (step * batch_size + row for row in shards.mine)
      picked = (mixture[number] for number in numbers if number < total)
      elements = [rows[source][index] for source, index in picked]
      yield _stack(elements, len(shards.mine), stores.seq_len)

  return BatchIterator(batches(), stores, split, timeout)


def _pack_texts(
  texts: Iterable[str], tokenizer: Tokenizer, seq_len: int
) -> Iterator[packing.Row]:
  pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
  dtype = store.token_dtype(tokenizer.vocab_size)
  packer = packing.Packer(seq_len, pad_id, dtype, max_waste=1.0)
  documents = (
    tokenizer.encode_document(text)
    for text in texts
    if text and not text.isspace()
  )
  return packing.pack((d for d in documents if len(d) > 1), packer)


def file_batches(
  specs: Sequence[str],
  tokenizer: Tokenizer,
  config: DataConfig,
  batch_size: int,
  num_batches: int | None = None,
) -> Iterator[Batch]:
  """Batches of files (or any sources) that are in no store, all of each.

  Args:
    specs: as in `data.sources`.
    tokenizer: the model's.
    config: its `seq_len` and `text_key` are used.
    batch_size: rows of a batch; the last is padded.
    num_batches: at most so many; None is all.

  Raises:
    DataError: a source is missing, empty or damaged.
  """

  def texts() -> Iterator[str]:
    for spec in specs:
      replaced = 0
      source = sources.open_source(spec, config.text_key)
      for number, file in enumerate(source.units()):
        for doc in source.documents(sources.Slice(number, 0, file.count)):
          replaced += doc.replaced
          yield doc.text
      if replaced:
        logger.warning(
          "%s: %d invalid UTF-8 sequences replaced", spec, replaced
        )

  rows = enumerate(_pack_texts(texts(), tokenizer, config.seq_len))
  count = 0
  while num_batches is None or count < num_batches:
    picked = itertools.islice(rows, batch_size)
    elements = [as_element(row, 0, number) for number, row in picked]
    if not elements:
      break
    count += 1
    yield as_batch(_stack(elements, batch_size, config.seq_len))
  if not count:
    raise DataError(f"there is no text in {', '.join(specs)}")


@dataclasses.dataclass(frozen=True)
class _ByShard:
  """Reorders the mixture so that each shard's rows are neighbours.

  Grain deals rows to the shards in turn; here each gets those that are its own.
  """

  mixture: Mixture
  shards: Shards
  first_row: int = 0

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> tuple[int, int]:
    start = index - index % self.shards.batch_size
    place, shard = divmod(index - start, len(self.shards.rows))
    row = start + self.shards.rows[shard][place]
    return self.mixture[self.first_row + row]


@dataclasses.dataclass(frozen=True)
class _ReadRow:
  """Row number -> element; goes to reader processes by pickle."""

  token_store: store.TokenStore
  split: str
  source: int

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self.token_store.warm_up()

  def __call__(self, row: int) -> np.ndarray:
    return as_element(self.token_store.read(self.split, row), self.source, row)


def _rows(
  stores: StoreSet, number: int, split: str, seed: int, order: int = 0
) -> Any:
  """A Grain dataset of one store's rows, in another order each epoch."""
  import grain

  s = stores.stores[number]
  s.warm_up()
  if s.rows(split) >= 2**31:  # Grain shuffles, and elements hold, 32-bit ids
    raise DataError(f"{s.folder} has too many rows; split the source in two")
  # Grain adds the epoch to the seed: plain seeds would repeat each other.
  key = f"{seed}/{number}" if not order else f"{seed}/{number}/{order}"
  digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
  return (
    grain.MapDataset.range(max(1, s.rows(split)))
    .shuffle(seed=int.from_bytes(digest))
    .map(_ReadRow(s, split, number))
  )


def _stack(
  elements: Sequence[np.ndarray], batch_size: int, seq_len: int
) -> np.ndarray:
  """[B, 2, T+2] of up to B elements; the rest is padding."""
  stacked = np.zeros((batch_size, 2, seq_len + 2), np.int32)
  stacked[:, :, -1] = -1
  for number, element in enumerate(elements):
    stacked[number] = element
  return stacked


def _allow_workers() -> None:
  """Grain's reader processes want absl's flags parsed, if only by name."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
