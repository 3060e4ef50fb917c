# SPDX-License-Identifier: Apache-2.0
"""Sources -> tokenizer -> token store -> mixture -> [B, T] batches.

prepare(config)               text to rows on disk, once
open_stores(config, tok)      opens and checks them
load_batches(...)             endless training batches, from any step
validation_batches(...)       held-out rows, once, in a fixed order
file_batches(...)             rows of files that are in no store
"""

from moejax.data.batches import BatchIterator
from moejax.data.builder import prepare
from moejax.data.loader import (
  Shards,
  file_batches,
  load_batches,
  validation_batches,
)
from moejax.data.phased import PhasedStores
from moejax.data.sources import metric_names
from moejax.data.store_set import StoreSet, held_out_data, open_stores
from moejax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
  "BatchIterator",
  "PhasedStores",
  "Shards",
  "StoreSet",
  "Tokenizer",
  "file_batches",
  "held_out_data",
  "load_batches",
  "load_tokenizer",
  "metric_names",
  "open_stores",
  "prepare",
  "train_tokenizer",
  "validation_batches",
]
