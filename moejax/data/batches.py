# SPDX-License-Identifier: Apache-2.0
"""Rows as arrays, and the batches of them that come from readers."""

import atexit
import weakref
from concurrent import futures
from typing import Any, Self

import numpy as np

from moejax.data import packing
from moejax.data.store_set import Batch, StoreSet, check_vocabulary
from moejax.errors import DataError, StuckError


def as_element(row: packing.Row, source: int, number: int) -> np.ndarray:
  """[2, T+2] int32: tokens and source, segment ids and row number.

  One array, because Grain spends more time on a dict than reading a row takes.
  """
  element = np.empty((2, len(row.tokens) + 1), np.int32)
  element[0, :-1] = row.tokens
  element[0, -1] = source
  element[1, :-1] = row.segment_ids
  element[1, -1] = number
  return element


def as_batch(elements: np.ndarray) -> Batch:
  """Takes [B, 2, T+2] apart."""
  # A copy: batches of reader processes lie in memory that is shared with them.
  elements = np.array(elements)
  inputs = packing.model_inputs(elements[:, 0, :-1], elements[:, 1, :-1])
  source = elements[:, 0, -1].astype(np.int32)
  return inputs | {
    "source": source,
    "source_ids": np.repeat(source[:, None], inputs["tokens"].shape[1], 1),
    "row": elements[:, 1, -1].astype(np.int64),
  }


class BatchIterator:
  """Iterates over batches; close it, or use it in a `with` block.

  Each batch is a dict of arrays, of this process's rows:
    tokens, targets, segment_ids, positions: int32 [B, T]; see
      `packing.model_inputs`.
    loss_mask: bool [B, T].
    source: int32 [B], index into `StoreSet.stores`; -1 for padding rows.
    source_ids: the same for each token, int32 [B, T].
    row: int64 [B], row of that store's split; -1 for padding rows.
  """

  def __init__(
    self, iterator: Any, stores: StoreSet, split: str, timeout: float
  ):
    """Args:
    iterator: of [B, 2, T+2] elements, with a `close`.
    stores: that they are of.
    split: of the stores.
    timeout: seconds that one may take to come.
    """
    # In a thread of its own, so that it need not be waited for for ever.
    thread = futures.ThreadPoolExecutor(1, "moejax-batches")
    self._held = [(iterator, thread)]
    self._stores = stores
    self._split = split
    self._timeout = timeout
    # Not by a finalizer: Python may collect this in the midst of its own work
    # on threads, whose locks waiting for a thread would need.
    _unclosed.add(self)
    # Anew, to run before what libraries have registered meanwhile.
    atexit.unregister(_close_all)
    atexit.register(_close_all)

  def __iter__(self) -> Self:
    return self

  def __next__(self) -> Batch:
    """The next batch.

    Raises:
      DataError: a damaged record, an id outside the vocabulary, or a reader
        process that died.
      StuckError: nothing comes.
    """
    if not self._held:
      raise ValueError("these batches are closed")
    iterator, thread = self._held[0]
    coming = thread.submit(next, iterator)
    if not futures.wait([coming], self._timeout).done:
      self._held.clear()  # closing would wait for it too
      folders = {str(s.folder.parent) for s in self._stores.stores}
      raise StuckError(
        f"no batch has come for {self._timeout:g} s (data.timeout): the disk "
        f"of {', '.join(sorted(folders))} or a reader process hangs; the same "
        "command goes on from the newest checkpoint"
      )
    try:
      batch = as_batch(coming.result())
    except RuntimeError as e:
      if "Worker process was terminated" not in str(e):
        raise
      raise DataError(
        f"a reader process died ({str(e).partition('.')[0]}), often for want "
        "of memory; run the same command to go on, or read in threads by "
        "data.num_workers=0"
      ) from e
    check_vocabulary(batch, self._stores, self._split)
    return batch

  def close(self) -> None:
    """Ends reader threads and processes."""
    while self._held:
      iterator, thread = self._held.pop()
      thread.shutdown()
      iterator.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


_unclosed: weakref.WeakSet[BatchIterator] = weakref.WeakSet()


def _close_all() -> None:
  """Readers left open hang or complain at the end of the program."""
  for batches in list(_unclosed):
    batches.close()
