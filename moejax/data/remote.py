# SPDX-License-Identifier: Apache-2.0
"""Token stores at an address: copied here once, checked, then read as files.

`manifest.json` is the last object of a store to be written and the first to be
removed, so a store is there whole or not at all.
"""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from moejax import storage
from moejax.config import DataConfig
from moejax.data import sources, store
from moejax.data.manifest import MANIFEST, find_fault
from moejax.errors import DataError
from moejax.files import write_atomically
from moejax.progress import progress_bar

# The manifest of a store that is being written: what was written of it stays.
SENDING = "manifest.json.tmp"
_PREPARE = "moejax data prepare --rebuild makes it anew"


def fetch(config: DataConfig, folder: pathlib.Path) -> None:
  """Brings the store of a folder here, unless it is: only what differs.

  Does nothing if `config.store` is a folder, or has no such store.

  Args:
    config: says where the stores are.
    folder: what `store_path` says.

  Raises:
    DataError: the store is damaged, or this disk is full.
    UserError: the object store does not answer.
  """
  if (address := _address(config, folder)) is None:
    return
  storage.require_backend(address)
  try:
    text = storage.read(f"{address}/{MANIFEST}").decode()
  except FileNotFoundError:
    return
  try:
    with _locked(folder):
      if not _has(folder, text):
        _copy(address, folder, text)
  except storage.StorageError:
    raise
  except OSError as e:
    raise DataError(
      f"cannot copy {address} to {folder}: {e.strerror or e}"
    ) from e


def send(config: DataConfig, folder: pathlib.Path, again: bool = False) -> None:
  """Brings a finished store to `config.store`, if that is an address.

  Args:
    config: says where the stores are.
    folder: of the finished store here.
    again: writes over what is there already.

  Raises:
    UserError: the object store does not take it; the same command goes on.
  """
  if (address := _address(config, folder)) is None:
    return
  text = (folder / MANIFEST).read_text()
  if not again and _read(f"{address}/{MANIFEST}") == text:
    return
  there = storage.sizes(address)
  if again or _read(f"{address}/{SENDING}") != text:
    storage.remove(f"{address}/{MANIFEST}")
    storage.write(f"{address}/{SENDING}", text.encode())
    there = {}
  names = [
    path.name
    for path in sorted(folder.iterdir())
    if path.name not in (MANIFEST, SENDING, store.VERIFIED)
  ]
  left = {
    name: size
    for name in names
    if (size := (folder / name).stat().st_size) != _size(there, name)
  }
  with progress_bar(f"sending to {address}, bytes", sum(left.values())) as bar:
    for name, size in left.items():
      storage.upload(folder / name, f"{address}/{name}")
      bar.advance(size)
  storage.write(f"{address}/{MANIFEST}", text.encode())
  storage.remove(f"{address}/{SENDING}")


def _address(config: DataConfig, folder: pathlib.Path) -> str | None:
  found = storage.address(config.store)
  return f"{found}/{folder.name}" if found else None


def _size(sizes: dict[str, int], name: str) -> int | None:
  return sizes[name] if name in sizes else None


def _read(path: str) -> str | None:
  try:
    return storage.read(path).decode()
  except FileNotFoundError:
    return None


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """One process of this machine copies, the others wait for it."""
  folder.mkdir(parents=True, exist_ok=True)
  with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _has(folder: pathlib.Path, text: str) -> bool:
  path = folder / MANIFEST
  return (
    path.exists()
    and path.read_text() == text
    and all(
      (folder / name).is_file()
      and (folder / name).stat().st_size == shard["bytes"]
      for name, shard in _shards(json.loads(text)).items()
    )
  )


def _shards(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
  return {
    shard["name"]: shard
    for split in manifest["splits"].values()
    for shard in split["shards"]
  }


def _copy(address: str, folder: pathlib.Path, text: str) -> None:
  """Copies what the folder has not, the manifest last."""
  shards = _shards(_parsed(address, text))
  (folder / MANIFEST).unlink(missing_ok=True)
  missing = [n for n, shard in shards.items() if not _is(folder / n, shard)]
  total = sum(shards[name]["bytes"] for name in missing)
  with progress_bar(f"copying {address}, bytes", total) as bar:
    for name in missing:
      partial = folder / f"{name}.partial"
      try:
        storage.download(f"{address}/{name}", partial)
      except FileNotFoundError:
        raise DataError(f"{address}/{name} is missing; {_PREPARE}") from None
      if not _is(partial, shards[name]):
        partial.unlink()
        raise DataError(
          f"{address}/{name} is damaged: its SHA-256 is not the one in "
          f"{MANIFEST}; {_PREPARE}"
        )
      partial.replace(folder / name)
      bar.advance(shards[name]["bytes"])
  for name in set(storage.names(address)) - {MANIFEST, store.VERIFIED}:
    if name not in shards and name.endswith(".json"):
      (folder / name).write_bytes(storage.read(f"{address}/{name}"))
  seen = {name: store.file_state((folder / name).stat()) for name in shards}
  store.remember_verified(folder, shards=seen, sources={})
  write_atomically(folder / MANIFEST, text)


def _parsed(address: str, text: str) -> dict[str, Any]:
  """The manifest, which may come from anywhere: its names are checked."""
  try:
    manifest = json.loads(text)
    fault = find_fault(manifest)
  except (ValueError, KeyError, TypeError, RecursionError) as e:
    fault = repr(e)
  if fault:
    raise DataError(f"{address}/{MANIFEST} is damaged: {fault}; {_PREPARE}")
  return manifest


def _is(path: pathlib.Path, shard: dict[str, Any]) -> bool:
  """Whether a file is a shard, byte for byte."""
  return (
    path.is_file()
    and path.stat().st_size == shard["bytes"]
    and sources.file_digest(path) == shard["sha256"]
  )
