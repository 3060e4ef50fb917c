# SPDX-License-Identifier: Apache-2.0
"""Each process's share of a step's files: what it says of it to process 0.

A file, not a message: it works on every store and needs no devices, which train
meanwhile. There is none if a process failed and could not even write that.
"""

import contextlib
import json
from typing import Any

from etils import epath

from moejax.checkpoint import files, processes
from moejax.checkpoint.manifest import UNFINISHED
from moejax.errors import CheckpointError

SHARE = "share.{}.json"

Digests = dict[str, tuple[int, str]]


def digest(folder: epath.Path) -> Digests:
  """Reads this process's share of the files, and tells process 0 of it.

  Returns:
    Bytes and digest of each.

  Raises:
    OSError: a file could not be read, or the result not be written.
  """
  index, count = processes.index_and_count()
  own = (UNFINISHED, *(SHARE.format(i) for i in range(count)))
  names = [name for name in files.list_files(folder) if name not in own]
  digests = files.digest_files(folder, names[index::count], sync=True)
  for entry in digests.values():
    if isinstance(entry, OSError):
      raise entry
  _tell(folder, {"digests": digests})
  return digests


def tell_failure(folder: epath.Path, failure: BaseException) -> None:
  """Tells process 0 why there are none, if that can be written."""
  with contextlib.suppress(Exception):  # the others wait for this one
    _tell(folder, {"failed": files.reason(failure)})


def _tell(folder: epath.Path, said: dict[str, Any]) -> None:
  if not processes.is_first():
    index, _ = processes.index_and_count()
    files.write_text(folder / SHARE.format(index), json.dumps(said))


def told_failure(folder: epath.Path) -> CheckpointError | None:
  """Why another process failed, if one told."""
  _, count = processes.index_and_count()
  for i in range(1, count):
    said = _said(folder, i)
    if "failed" in said:
      return CheckpointError(
        f"process {i} could not write its part: {said['failed']}"
      )
  return None


def collect(folder: epath.Path) -> Digests:
  """What all other processes told.

  Raises:
    CheckpointError: one of them told nothing.
  """
  _, count = processes.index_and_count()
  digests = {}
  for i in range(1, count):
    said = _said(folder, i)
    if "digests" not in said:
      raise CheckpointError(
        f"process {i} could not write its part, and may say why"
      )
    digests |= {name: tuple(entry) for name, entry in said["digests"].items()}
    files.remove(folder / SHARE.format(i))
  return digests


def _said(folder: epath.Path, index: int) -> dict[str, Any]:
  """Of a process; nothing if a full disk kept it from that, too."""
  try:
    return json.loads(files.read_bytes(folder / SHARE.format(index)))
  except (OSError, ValueError):
    return {}
