# SPDX-License-Identifier: Apache-2.0
"""The token stores of a config, opened and checked together."""

import dataclasses
import pathlib

import numpy as np

from moejax.config import DataConfig, EvalSetConfig
from moejax.data import manifest as manifest_lib
from moejax.data import remote, sources, store
from moejax.data.tokenizer import Tokenizer
from moejax.errors import DataError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class StoreSet:
  """The opened stores of a config's sources, in its order.

  Attributes:
    stores: one a source.
    weights: share of each in the training rows.
    vocab_size: ids must be below it.
    seq_len: T.
  """

  stores: tuple[store.TokenStore, ...]
  weights: tuple[float, ...]
  vocab_size: int
  seq_len: int

  def rows(self, split: str) -> int:
    """Rows of all stores in `train` or `validation`."""
    return sum(s.rows(split) for s in self.stores)

  @property
  def fingerprint(self) -> str:
    """SHA-256 of all that decides the rows, weights included."""
    parts = [s.fingerprint for s in self.stores] + [repr(self.weights)]
    return sources.text_digest("\n".join(parts))

  def describe(self) -> str:
    """One line for people."""
    total = sum(self.weights)
    return " + ".join(
      f"{weight / total:.3g} x {s.source} ({s.rows('train'):,} rows)"
      if len(self.stores) > 1
      else f"{s.source} ({s.rows('train'):,} rows of {self.seq_len})"
      for s, weight in zip(self.stores, self.weights)
    )


def open_stores(config: DataConfig, tokenizer: Tokenizer) -> StoreSet:
  """Opens and checks the stores of all `config.sources`.

  Raises:
    DataError: a store is missing, damaged, or of another tokenizer.
  """
  stores = []
  for spec in config.sources:
    folder = store.store_path(config, spec, tokenizer)
    remote.fetch(config, folder)
    if not (folder / manifest_lib.MANIFEST).exists():
      raise DataError(_missing(config, spec, folder))
    opened = store.TokenStore.open(folder, tokenizer)
    if opened.seq_len != config.seq_len:
      raise DataError(
        f"{folder} has rows of {opened.seq_len} tokens, data.seq_len is "
        f"{config.seq_len}; delete it and prepare again"
      )
    stores.append(opened)
  weights = config.weights or tuple(float(s.rows("train")) for s in stores)
  return StoreSet(tuple(stores), weights, tokenizer.vocab_size, config.seq_len)


def held_out_data(config: DataConfig, entry: EvalSetConfig) -> DataConfig:
  """The data of a set that is evaluated on, in rows as the run's.

  All of it: as training rows of a store of its own, which nothing trains on.
  """
  return dataclasses.replace(
    config, sources=entry.data, weights=(), validation_fraction=0.0
  )


def _missing(config: DataConfig, spec: str, folder: pathlib.Path) -> str:
  slug = sources.slug(spec)
  others = sorted(
    path.parent.name
    for path in folder.parent.glob(f"{slug}-*/{manifest_lib.MANIFEST}")
  )
  near = f" (there is {', '.join(others)})" if others else ""
  return (
    f"no token store for {spec} with seq_len={config.seq_len} and tokenizer "
    f"{config.tokenizer} under {config.store}{near}; run moejax data "
    "prepare with the same --config and the same --config.data options"
  )


def check_vocabulary(batch: Batch, stores: StoreSet, split: str) -> None:
  """Ids outside the vocabulary stop here: on the device they are clamped.

  Raises:
    DataError: naming the source, the row and the id.
  """
  for name in ("tokens", "targets"):
    array = batch[name]
    if array.max() < stores.vocab_size and array.min() >= 0:
      continue
    bad = (array < 0) | (array >= stores.vocab_size)
    b = int(bad.any(1).argmax())
    s = stores.stores[batch["source"][b]]
    raise DataError(
      f"{s.source}, {split} row {batch['row'][b]}: token id "
      f"{array[b][bad[b]][0]} is outside the vocabulary of "
      f"{stores.vocab_size}; delete {s.folder} and prepare again"
    )
