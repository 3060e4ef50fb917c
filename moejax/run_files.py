# SPDX-License-Identifier: Apache-2.0
"""The small files of a run, where it lives at an address.

Its checkpoints go straight to the store. Its config, tokenizer, logs and
report are files of a folder of this machine, sent there before each checkpoint
exists and fetched when the run goes on, here or elsewhere. Logs may so have
lines of later steps than the newest checkpoint, never fewer.
"""

import hashlib
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Self

from moejax import storage
from moejax.errors import UserError
from moejax.files import cache_folder
from moejax.objectlock import lock_of
from moejax.runlock import LOCK_FILE

# What a run has besides; not to be fetched or sent.
CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


class RunFiles:
  """A run that this process goes on with: its lock and its files.

  A context manager that holds the lock. Of a run in a folder it is nothing but
  that folder. Of several processes only the first has files at an address.

  Attributes:
    workdir: the folder or address.
    folder: where to write small files.
  """

  def __init__(self, workdir: str | os.PathLike, first: bool = True):
    """Args: workdir: of the run; first: whether this is its first process."""
    self._address = storage.address(workdir)
    self.workdir: str | Path = self._address or Path(workdir)
    self.folder = (
      _copy_of(self._address, "training") if self._address else Path(workdir)
    )
    self._first = first
    self._lock = lock_of(self.workdir, holder=first)
    # Of each file that the store has: bytes and time of change.
    self._sent: dict[str, tuple[int, int]] = {}
    self._sending = threading.Lock()

  def __enter__(self) -> Self:
    """Raises UserError: another run has it, or the store does not answer."""
    self._lock.acquire()
    if self._address and self._first:
      try:
        # What a run before left here may be older than what another host sent.
        shutil.rmtree(self.folder, ignore_errors=True)
        _fetch(self._address, self.folder)
        self._sent = _states(self.folder)
      except BaseException:
        self._lock.release()
        raise
    return self

  def __exit__(self, *exc_info) -> None:
    self.publish()
    self._lock.release()

  def require_held(self) -> None:
    """Makes sure that the folder or address still is this run's.

    Raises:
      RunLockError: it was removed, or another run has taken it over.
      StorageError: the store does not answer.
    """
    if self._first:
      self._lock.require_held()

  def send(self) -> None:
    """Brings all files that changed to the store; any thread.

    Raises:
      RunLockError: another run has taken the address over.
      StorageError: the store does not take them.
    """
    if not self._first or not self._address:
      return
    with self._sending:
      self._lock.require_held()
      _send(self.folder, self._address, self._sent)

  def publish(self) -> None:
    """The same, where it is no reason to stop if it fails."""
    try:
      self.send()
    except UserError as e:
      logger.warning("logs are not sent to %s: %s", self.workdir, e)


def fetched(workdir: str | os.PathLike) -> Path:
  """A folder with a run's small files: its own, or a fresh copy of them.

  Raises:
    UserError: the store does not answer, or its library is not installed.
  """
  found = storage.address(workdir)
  if found is None:
    return Path(workdir)
  folder = _copy_of(found, "reading")
  storage.require_backend(found)
  _fetch(found, folder)
  return folder


def send_folder(workdir: str | os.PathLike, name: str) -> None:
  """Brings what was written in a folder of `fetched` to the store.

  Args:
    workdir: of the run; a folder has it already.
    name: of the folder below.

  Raises:
    UserError: the store does not take it.
  """
  found = storage.address(workdir)
  if found is not None:
    _send(_copy_of(found, "reading") / name, f"{found}/{name}", {})


def _copy_of(address: str, use: str) -> Path:
  """Those who read it have one of their own, as a run may go on meanwhile."""
  digest = hashlib.sha256(address.encode()).hexdigest()[:16]
  return cache_folder("runs") / use / digest / address.rpartition("/")[2]


def _fetch(address: str, folder: Path) -> None:
  """Copies the files, not the folders, of a run; each whole."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f"cannot write the cache {folder}: {e.strerror}") from e
  for name in storage.names(address):
    if name in (CHECKPOINTS, LOCK_FILE) or name.startswith("."):
      continue
    try:
      data = storage.read(f"{address}/{name}")
    except (FileNotFoundError, IsADirectoryError):
      continue  # a folder, such as the report's
    partial = folder / f"{name}.{os.getpid()}.partial"
    try:
      partial.write_bytes(data)
      partial.replace(folder / name)
    except OSError as e:
      raise UserError(f"cannot write {folder / name}: {e.strerror}") from e


def _send(folder: Path, address: str, sent: dict[str, tuple[int, int]]) -> None:
  for name, state in _states(folder).items():
    if name not in sent or sent[name] != state:
      # Logs grow meanwhile: the state is that of before, so they go again.
      try:
        data = (folder / name).read_bytes()
      except FileNotFoundError:
        continue  # one in the making
      storage.write(f"{address}/{name}", data)
      sent[name] = state


def _states(folder: Path) -> dict[str, tuple[int, int]]:
  found = {}
  for path in sorted(folder.rglob("*")):
    if path.is_file() and path.suffix not in (".partial", ".tmp"):
      stat = path.stat()
      name = path.relative_to(folder).as_posix()
      found[name] = stat.st_size, stat.st_mtime_ns
  return found
