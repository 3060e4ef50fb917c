# SPDX-License-Identifier: Apache-2.0
"""Tokenises and packs one part of a source into its shards."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from moejax.data import manifest as manifest_lib
from moejax.data import sources, store
from moejax.data.packing import MIN_PIECE, Packer
from moejax.data.tokenizer import Tokenizer
from moejax.errors import DataError
from moejax.files import write_atomically

PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is to be written; equal plans write equal bytes.

  Attributes:
    key: `store.store_key`: source, text key, tokenizer, row length, fraction.
    spec: the entry of `data.sources`, to open it by.
    digests: SHA-256 of each source file, by name.
    parts: units of the source, one list for each part.
    part_bytes: roughly how much text each part holds, for progress.
  """

  key: dict[str, Any]
  spec: str
  digests: dict[str, str]
  parts: list[list[list[int]]]
  part_bytes: list[float]

  @classmethod
  def load(cls, folder: pathlib.Path) -> "Plan":
    return cls(**json.loads((folder / PLAN).read_text()))

  def text(self) -> str:
    return json.dumps(dataclasses.asdict(self), sort_keys=True)


def part_name(index: int) -> str:
  """The file that says that a part is finished, and what it holds."""
  return f"part-{index:05d}.json"


def write_part(
  folder: pathlib.Path,
  plan: Plan,
  index: int,
  source: sources.Source,
  tokenizer: Tokenizer,
  advance: Callable[[float], None],
) -> dict[str, Any]:
  """Writes the shards of part `index`, then its summary; each atomically.

  Args:
    folder: the store in the making.
    plan: what to write.
    index: which part.
    source, tokenizer: of the plan, opened.
    advance: told the bytes of text done since the last call, now and then.

  Returns:
    the summary: counts, and rows, bytes and SHA-256 of each split's shard.

  Raises:
    DataError: bad input, or the folder cannot be written.
  """
  counts = dict.fromkeys(
    ("documents", "validation_documents", "empty_documents", "replaced",
     "bytes", "tokens"), 0
  )  # fmt: skip
  writers: dict[str, _ShardWriter] = {}
  try:
    for split in manifest_lib.SPLITS:
      name = manifest_lib.shard_name(split, index, len(plan.parts))
      writers[split] = _ShardWriter(folder / name, plan, tokenizer)
    reported = 0.0
    for piece in plan.parts[index]:
      for doc in source.documents(sources.Slice(*piece)):
        _add_document(doc, plan, tokenizer, writers, counts)
        if counts["bytes"] - reported > 1 << 18:
          advance(counts["bytes"] - reported)
          reported = counts["bytes"]
    summary = counts | {
      "shards": {split: writer.finish() for split, writer in writers.items()}
    }
    write_atomically(folder / part_name(index), json.dumps(summary))
  except (OSError, RuntimeError) as e:
    # array_record writes in the background: a full disk shows on closing, as a
    # RuntimeError with the system's words.
    raise DataError(
      f"cannot write {folder}: {str(e).split(';')[0]}; finished parts are "
      "kept, the same command goes on"
    ) from e
  finally:
    for writer in writers.values():
      writer.discard()
  return summary


def _add_document(
  doc: sources.Document,
  plan: Plan,
  tokenizer: Tokenizer,
  writers: "dict[str, _ShardWriter]",
  counts: dict[str, int],
) -> None:
  data = doc.text.encode()
  counts["bytes"] += len(data)
  counts["replaced"] += doc.replaced
  blank = not doc.text or doc.text.isspace()
  tokens = () if blank else tokenizer.encode_document(doc.text)
  if len(tokens) < MIN_PIECE:
    counts["empty_documents"] += 1
    return
  split = "train"
  if is_validation(data, plan.key["validation_fraction"]):
    split = "validation"
    counts["validation_documents"] += 1
  counts["documents"] += 1
  counts["tokens"] += len(tokens)
  writers[split].add(tokens)


def is_validation(data: bytes, fraction: float) -> bool:
  """Whether a document is held out: decided by its text alone.

  So the same text is never trained on and evaluated, in any source or order.
  """
  value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
  return value < fraction * 2**64


class _ShardWriter:
  """Packs documents into one shard; it appears under its name when complete."""

  def __init__(self, path: pathlib.Path, plan: Plan, tokenizer: Tokenizer):
    from array_record.python import array_record_module

    self._path = path
    self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._partial), "group_size:1"
    )
    pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    dtype = store.token_dtype(tokenizer.vocab_size)
    self._packer = Packer(plan.key["seq_len"], pad_id, dtype)
    self._rows = self._used = 0
    self._content = hashlib.sha256()

  def add(self, tokens: np.ndarray) -> None:
    self._write(self._packer.add(tokens))

  def _write(self, rows) -> None:
    for row in rows:
      self._writer.write(store.encode_row(row))
      self._content.update(row.tokens.tobytes())
      self._content.update(row.segment_ids.tobytes())
      self._rows += 1
      self._used += int(np.count_nonzero(row.segment_ids))

  def finish(self) -> dict[str, Any]:
    self._write(self._packer.flush())
    self._writer.close()
    with open(self._partial, "rb") as f:
      os.fsync(f.fileno())
    summary = {
      "name": self._path.name,
      "rows": self._rows,
      "used_slots": self._used,
      "rows_sha256": self._content.hexdigest(),
      "bytes": self._partial.stat().st_size,
      "sha256": sources.file_digest(self._partial),
    }
    os.replace(self._partial, self._path)
    return summary

  def discard(self) -> None:
    """Removes what is unfinished; nothing after `finish`."""
    if self._partial.exists():
      with contextlib.suppress(RuntimeError):
        self._writer.close()
      self._partial.unlink(missing_ok=True)
