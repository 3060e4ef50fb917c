# SPDX-License-Identifier: Apache-2.0
"""Documents into rows of equal length, losing no token and counting none twice.

A row has T+1 slots: inputs are slots [0, T), targets slots [1, T+1). A piece (a
document or a part of one) fills consecutive slots of one row. Where a document
is cut, the second piece starts by repeating the last token of the first, so
each token but a document's first is the target of exactly one slot.

Pieces go to the open row that they fill best, out of a bounded window. When
none has room, the fullest row is closed; a piece is cut to fill it up first if
the padding would otherwise exceed `max_waste` of all slots so far.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

MIN_PIECE = 2  # one token and its target


@dataclasses.dataclass(frozen=True)
class Row:
  """One packed row.

  Attributes:
    tokens: [T+1] token ids; the padding id where `segment_ids` is 0.
    segment_ids: [T+1] 1, 2, ... for each piece in turn, 0 for padding.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray


class Packer:
  """Packs documents, one at a time, in bounded memory.

  Args:
    seq_len: T; rows have T+1 slots.
    pad_id: token of unused slots.
    dtype: of the rows' tokens.
    window: open rows at a time.
    max_waste: share of padding above which documents are cut to fill rows; 1
      never cuts a document that fits in a row.
  """

  def __init__(
    self,
    seq_len: int,
    pad_id: int,
    dtype: np.dtype,
    window: int = 128,
    max_waste: float = 0.02,
  ):
    self.slots = seq_len + 1
    self.pad_id = pad_id
    self.dtype = dtype
    self.window = window
    self.max_waste = max_waste
    self._open: list[tuple[int, int]] = []  # (free slots, row number), sorted
    self._pieces: dict[int, list[np.ndarray]] = {}
    self._opened = 0
    self._closed_slots = 0
    self._wasted = 0

  def add(self, tokens: np.ndarray) -> Iterator[Row]:
    """Takes a document [n], n >= 2; yields the rows that this completes."""
    if len(tokens) < MIN_PIECE:
      raise ValueError(f"a document of {len(tokens)} tokens has no target")
    stride = self.slots - 1
    start = 0
    while len(tokens) - start >= self.slots:
      yield self._finish([tokens[start : start + self.slots]], 0)
      start += stride
    if len(tokens) - start >= MIN_PIECE:
      yield from self._place(tokens[start:])

  def flush(self) -> Iterator[Row]:
    """Yields the rows that are still open."""
    while len(self._open) > 1 and self._wasteful(
      sum(free for free, _ in self._open), len(self._open)
    ):
      _, number = self._open.pop()  # the emptiest row fills up the others
      for piece in self._pieces.pop(number):
        yield from self._place(piece, may_open=False)
    for _, number in sorted(self._open, key=lambda entry: entry[1]):
      pieces = self._pieces.pop(number)
      yield self._finish(pieces, self.slots - sum(map(len, pieces)))
    self._open.clear()

  def _place(self, piece: np.ndarray, may_open: bool = True) -> Iterator[Row]:
    """Puts a piece of at most T+1 tokens into open rows."""
    while True:
      at = bisect.bisect_left(self._open, (len(piece), -1))
      if at < len(self._open):
        yield from self._put(at, piece)
        return
      if not self._open or (may_open and len(self._open) < self.window):
        self._opened += 1
        self._pieces[self._opened] = [piece]
        self._reopen(self.slots - len(piece), self._opened)
        return
      free, number = self._open[0]
      if may_open and not self._wasteful(free, 1):
        self._open.pop(0)
        yield self._finish(self._pieces.pop(number), free)
        continue
      head, piece = piece[:free], piece[free - 1 :]
      yield from self._put(0, head)

  def _put(self, at: int, piece: np.ndarray) -> Iterator[Row]:
    """Appends a piece to the open row at index `at`; yields it if now full."""
    free, number = self._open.pop(at)
    self._pieces[number].append(piece)
    free -= len(piece)
    if free >= MIN_PIECE:
      self._reopen(free, number)
    else:
      yield self._finish(self._pieces.pop(number), free)

  def _reopen(self, free: int, number: int) -> None:
    bisect.insort(self._open, (free, number))

  def _wasteful(self, free: int, rows: int) -> bool:
    """Whether closing `rows` rows with `free` slots empty is too much waste."""
    slots = self._closed_slots + rows * self.slots
    return self._wasted + free > self.max_waste * slots

  def _finish(self, pieces: list[np.ndarray], free: int) -> Row:
    self._closed_slots += self.slots
    self._wasted += free
    tokens = np.full(self.slots, self.pad_id, self.dtype)
    segment_ids = np.zeros(self.slots, np.uint16)
    start = 0
    for number, piece in enumerate(pieces, 1):
      tokens[start : start + len(piece)] = piece
      segment_ids[start : start + len(piece)] = number
      start += len(piece)
    return Row(tokens, segment_ids)


def pack(documents: Iterable[np.ndarray], packer: Packer) -> Iterator[Row]:
  """All rows of `documents`, in order."""
  for tokens in documents:
    yield from packer.add(tokens)
  yield from packer.flush()


def model_inputs(
  tokens: np.ndarray, segment_ids: np.ndarray
) -> dict[str, np.ndarray]:
  """What the model reads of rows.

  Args:
    tokens, segment_ids: [..., T+1], the slots of rows.

  Returns:
    arrays [..., T]: tokens, targets, segment_ids and positions (int32;
    positions count from 0 within each piece), and loss_mask (bool; False where
    the next slot is padding or another piece).
  """
  tokens = tokens.astype(np.int32)
  segment_ids = segment_ids.astype(np.int32)
  here, there = segment_ids[..., :-1], segment_ids[..., 1:]
  slots = np.arange(segment_ids.shape[-1] - 1, dtype=np.int32)
  starts = np.zeros_like(here)
  starts[..., 1:] = np.where(here[..., 1:] != here[..., :-1], slots[1:], 0)
  return {
    "tokens": tokens[..., :-1],
    "targets": tokens[..., 1:],
    "segment_ids": here,
    "positions": slots - np.maximum.accumulate(starts, axis=-1),
    "loss_mask": (here == there) & (here > 0),
  }
