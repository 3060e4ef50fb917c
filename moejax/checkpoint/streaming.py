# SPDX-License-Identifier: Apache-2.0
"""Checkpoints leaf by leaf, for weights that never are in memory together.

What is written is an ordinary step: Orbax's own tree of Zarr arrays, cut along
the first axis, with a manifest. A journal in the unfinished step lists the
leaves that are on the disk, so a writer that was stopped goes on.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from moejax.checkpoint import arrays, files, layout
from moejax.checkpoint.leaves import Leaf
from moejax.checkpoint.manifest import ARRAYS, META, UNFINISHED, Manifest
from moejax.errors import CheckpointError

JOURNAL = "journal.jsonl"


class StepWriter:
  """Writes one step a leaf at a time; made again, it goes on.

  Only one process may have one; the folder's run lock sees to that.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    step: int,
    table: Mapping[str, Leaf],
    source: str,
  ):
    """Begins the step, or goes on with it.

    Args:
      directory: where the steps are; local.
      step: must not exist yet, other than unfinished.
      table: all leaves that will be written.
      source: what the leaves are made of; another one is not gone on with.

    Raises:
      CheckpointError: the step is there and not an unfinished one of this
        source, the disk has too little room, or cannot be written.
    """
    self.folder = epath.Path(os.path.abspath(directory)) / str(step)
    self._step, self._table = step, dict(table)
    self._head = {
      "source": source,
      "leaves": {name: str(leaf) for name, leaf in self._table.items()},
    }
    self._done: dict[str, dict[str, tuple[int, str]]] = {}
    try:
      self._begin()
    except (OSError, ValueError) as e:  # TensorStore raises the latter
      raise self._failed(e) from e

  def pending(self) -> Iterator[str]:
    """Names of the leaves that are not on the disk yet."""
    return (name for name in self._table if name not in self._done)

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes a leaf and brings it to the disk.

    Raises:
      CheckpointError: it is not as the table says, or the disk refused; what
        was written before stays.
    """
    found = Leaf(array.shape, str(array.dtype))
    if found != self._table[name]:
      raise CheckpointError(f"{name}: {found}, not {self._table[name]}")
    try:
      where = arrays.write_leaf(self.folder / ARRAYS, name, array)
      digests = self._digest(where)
      self._record({"leaf": name, "files": digests})
    except (OSError, ValueError) as e:
      raise self._failed(e) from e
    self._done[name] = digests

  def commit(self, meta: Mapping[str, Any]) -> None:
    """Makes the step exist.

    Args:
      meta: JSON to keep with it.

    Raises:
      CheckpointError: leaves are missing, or the disk refused.
    """
    if missing := list(self.pending()):
      raise CheckpointError(f"{len(missing)} leaves are not written")
    try:
      files.write_text(self.folder / META, json.dumps(meta, sort_keys=True))
      digests = {k: v for leaf in self._done.values() for k, v in leaf.items()}
      rest = set(files.list_files(self.folder)) - {UNFINISHED, JOURNAL}
      digests |= _checked(
        files.digest_files(self.folder, sorted(rest - set(digests)), sync=True)
      )
      files.remove(self.folder / JOURNAL)
      text = Manifest(self._step, self._table, digests).to_text()
      layout.commit(self.folder, text)
    except OSError as e:
      raise self._failed(e) from e

  def _begin(self) -> None:
    kind = layout.kind(self.folder)
    if kind == layout.Kind.UNFINISHED and self._read_journal():
      return
    if kind not in (layout.Kind.MISSING, layout.Kind.UNFINISHED):
      raise CheckpointError(f"{self.folder} is there already")
    self._require_room()
    layout.begin(self.folder)
    files.remove(self.folder / ARRAYS)
    arrays.write_skeleton(self.folder / ARRAYS, self._table)
    files.write_text(self.folder / JOURNAL, json.dumps(self._head) + "\n")

  def _read_journal(self) -> bool:
    """Takes over what is done; False if the step was cut short before that."""
    try:
      lines = (self.folder / JOURNAL).read_text().splitlines()
      head, *entries = [json.loads(line) for line in lines if _whole(line)]
    except (FileNotFoundError, ValueError):
      return False
    if head != self._head:
      raise CheckpointError(
        f"{self.folder} holds unfinished work on {head['source']}; delete it "
        "or use another folder"
      )
    # Lines that a kill cut short are written again whole.
    text = "".join(json.dumps(x) + "\n" for x in (head, *entries))
    files.write_text(self.folder / JOURNAL, text)
    for entry in entries:
      found = {name: tuple(x) for name, x in entry["files"].items()}
      if all(_size(self.folder / name) == x[0] for name, x in found.items()):
        self._done[entry["leaf"]] = found
    return True

  def _record(self, entry: Mapping[str, Any]) -> None:
    with (self.folder / JOURNAL).open("a") as f:
      f.write(json.dumps(entry) + "\n")
      f.flush()
      os.fsync(f.fileno())

  def _digest(self, folder: epath.Path) -> dict[str, tuple[int, str]]:
    within = os.fspath(folder.relative_to(self.folder))
    names = [os.path.join(within, name) for name in files.list_files(folder)]
    return _checked(files.digest_files(self.folder, names, sync=True))

  def _require_room(self) -> None:
    needed = sum(leaf.num_bytes for leaf in self._table.values())
    free = files.free_bytes(_existing(self.folder))
    if free is not None and needed > free:
      raise CheckpointError(
        f"{self.folder} needs {files.size_text(needed)}, its disk has "
        f"{files.size_text(free)} free; make room or use another folder"
      )

  def _failed(self, cause: Exception) -> CheckpointError:
    free = files.free_bytes(_existing(self.folder))
    space = "" if free is None else f" ({files.size_text(free)} are free)"
    return CheckpointError(
      f"cannot write {self.folder}: {files.reason(cause)}{space}; what is "
      "written stays, and the same command goes on with it"
    )


class LeafReader:
  """Leaves of a checked step, each read alone."""

  def __init__(self, folder: epath.Path, manifest: Manifest):
    """Args: folder: of the step; manifest: its own."""
    self.table = dict(manifest.leaves)
    self._folder = folder

  def read(self, name: str, index: int | None = None) -> np.ndarray:
    """The leaf, or entry `index` of its first axis, read alone."""
    return arrays.read_leaf(self._folder / ARRAYS, name, index)


def _checked(digests: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
  for entry in digests.values():
    if isinstance(entry, OSError):
      raise entry
  return dict(digests)


def _whole(line: str) -> bool:
  return line.endswith("}")


def _size(path: epath.Path) -> int:
  return path.stat().length if path.exists() else -1


def _existing(folder: epath.Path) -> epath.Path:
  """The nearest folder that is there."""
  while not folder.exists():
    folder = folder.parent
  return folder
