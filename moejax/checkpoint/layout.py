# SPDX-License-Identifier: Apache-2.0
"""The folder of checkpoints: what in it is a step, a leftover or a stray."""

import enum
import os

from etils import epath

from moejax import storage
from moejax.checkpoint import files, manifest


class Kind(enum.Enum):
  """What a name in the folder is."""

  COMMITTED = enum.auto()  # has a manifest
  UNFINISHED = enum.auto()  # ours: being written or deleted, or cut short
  STRAY = enum.auto()  # not ours; ignored
  MISSING = enum.auto()


def kind(folder: epath.Path) -> Kind:
  """Looks at what would be a step's folder."""
  local = files.is_local(folder)
  if local and not folder.exists():
    return Kind.MISSING
  if not is_step(folder.name) or (local and not folder.is_dir()):
    return Kind.STRAY
  inside = _names(folder)
  if not local and not inside:
    return Kind.MISSING
  if manifest.NAME in inside:
    return Kind.COMMITTED
  # An empty folder is what a kill just after making or just before removing it
  # leaves.
  if (
    not inside
    or manifest.UNFINISHED in inside
    or any(
      # Orbax's temporary name; a write that failed late may bring it back.
      name.startswith(f"{manifest.ARRAYS}.orbax-checkpoint-tmp")
      for name in inside
    )
  ):
    return Kind.UNFINISHED
  return Kind.STRAY


def numbered(directory: epath.Path) -> list[int]:
  """Names that could be steps, newest first; a missing folder has none."""
  names = [name for name in _names(directory) if is_step(name)]
  return sorted(map(int, names), reverse=True)


def not_steps(directory: epath.Path) -> list[str]:
  """Names that cannot be steps, sorted."""
  return sorted(name for name in _names(directory) if not is_step(name))


def is_step(name: str) -> bool:
  return name.isascii() and name.isdigit() and str(int(name)) == name


def begin(folder: epath.Path) -> None:
  """Makes the folder of a step, marked as unfinished."""
  if files.is_local(folder):
    folder.mkdir(parents=True, exist_ok=True)
  files.write_text(folder / manifest.UNFINISHED, "")


def commit(folder: epath.Path, text: str) -> None:
  """Makes the step exist, in one atomic operation."""
  if not files.is_local(folder):
    files.write_text(folder / manifest.NAME, text)
    files.remove(folder / manifest.UNFINISHED)
    return
  files.write_text(folder / manifest.UNFINISHED, text)
  files.rename(folder / manifest.UNFINISHED, folder / manifest.NAME)
  files.sync_folder(folder.parent)


def delete(folder: epath.Path) -> None:
  """Removes a step; at no moment does a half-deleted one look whole."""
  if manifest.NAME in _names(folder):
    if files.is_local(folder):
      files.rename(folder / manifest.NAME, folder / manifest.UNFINISHED)
    else:
      # With both names it exists; without either it would be a stray.
      files.write_text(folder / manifest.UNFINISHED, "")
      files.remove(folder / manifest.NAME)
  for name in _names(folder):
    if name != manifest.UNFINISHED:
      files.remove(folder / name)
  files.remove(folder / manifest.UNFINISHED)
  files.remove(folder)


def move_aside(folder: epath.Path) -> epath.Path:
  """Renames a stray that is in the way; returns its new place."""
  number, target = 1, folder.with_name(f"{folder.name}.stray")
  while target.exists():
    number += 1
    target = folder.with_name(f"{folder.name}.stray{number}")
  folder.rename(target)
  return target


def _names(folder: epath.Path) -> list[str]:
  if not files.is_local(folder):
    return storage.names(os.fspath(folder))
  try:
    return [path.name for path in folder.iterdir()]
  except (FileNotFoundError, NotADirectoryError):
    return []
