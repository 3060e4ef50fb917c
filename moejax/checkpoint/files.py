# SPDX-License-Identifier: Apache-2.0
"""Files that survive a power cut, and their digests; local or gs:// paths.

At an address each file is an object: whole or not there, and on other disks
than this host's.
"""

import concurrent.futures
import contextlib
import errno
import os
import re
import shutil
from collections.abc import Sequence

import xxhash
from etils import epath

from moejax import storage
from moejax.errors import UserError

CHUNK = 1 << 20  # bytes read at a time, which stay in a core's cache
THREADS = 4  # hashing lets go of the interpreter lock


def is_local(path: epath.Path) -> bool:
  return storage.address(path) is None


def folder_of(path: str | os.PathLike) -> epath.Path:
  """The path as one that knows its address, or else as it is.

  Raises:
    UserError: the library that its store needs is not installed.
  """
  if found := storage.address(path):
    storage.require_backend(found)
  return epath.Path(found or path)


def require_writable(path: epath.Path) -> None:
  """Refuses addresses that Orbax, of the library versions, cannot write."""
  if not is_local(path) and not os.fspath(path).startswith("gs://"):
    raise UserError(
      f"{path}: Orbax writes checkpoints to folders and gs://, no other "
      "store; use one of these, or mount the bucket"
    )


def list_files(folder: epath.Path) -> list[str]:
  """All files below the folder, links included, as sorted relative names."""
  if not is_local(folder):
    return sorted(storage.sizes(os.fspath(folder)))
  names = []
  for root, _, files in folder.walk():
    names += [os.fspath(root.relative_to(folder) / name) for name in files]
  return sorted(names)


def digest_files(
  folder: epath.Path, names: Sequence[str], sync: bool = False
) -> dict[str, tuple[int, str] | OSError]:
  """(bytes, digest) of each file, or the error that reading it gave.

  XXH3 of 128 bits: against what disks and memory do, not against people, who
  could write another manifest; four times as fast here as SHA-256.

  Args:
    folder: what the names are relative to.
    names: files to read.
    sync: also brings each file and its folders to the disk.
  """

  def digest(name: str) -> tuple[int, str] | OSError:
    path = folder / name
    try:
      return _digest(path, sync) if is_local(path) else _digest_object(path)
    except OSError as e:
      return e

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    digests = dict(zip(names, pool.map(digest, names)))
  if sync and is_local(folder):
    for parent in {(folder / name).parent for name in names}:
      while parent != folder.parent:
        sync_folder(parent)
        parent = parent.parent
  return digests


def _digest(path: epath.Path, sync: bool) -> tuple[int, str]:
  size, digest = 0, xxhash.xxh3_128()
  chunk = memoryview(bytearray(CHUNK))
  with path.open("rb") as f:
    while count := f.readinto(chunk):
      size += count
      digest.update(chunk[:count])
    if sync:
      os.fsync(f.fileno())
  return size, digest.hexdigest()


@storage.retried
def _digest_object(path: epath.Path) -> tuple[int, str]:
  return _digest(path, sync=False)


def read_bytes(path: epath.Path) -> bytes:
  """A file's content, of a small one."""
  return path.read_bytes() if is_local(path) else storage.read(os.fspath(path))


def write_text(path: epath.Path, text: str) -> None:
  """Writes the file and brings it to the disk."""
  if not is_local(path):
    storage.write(os.fspath(path), text.encode())
    return
  with path.open("w") as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())


def sync_folder(folder: epath.Path) -> None:
  """Brings the folder's list of names to the disk; object stores have none."""
  if not is_local(folder):
    return
  fd = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(fd)
  except OSError as e:
    if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network mounts
      raise
  finally:
    os.close(fd)


def rename(source: epath.Path, target: epath.Path) -> None:
  source.replace(target)
  sync_folder(target.parent)


def remove(path: epath.Path) -> None:
  """Removes a file, link or folder if it is there."""
  if not is_local(path):
    storage.remove_all(os.fspath(path))
    return
  with contextlib.suppress(FileNotFoundError):
    if path.is_dir() and not os.path.islink(path):
      path.rmtree()
    else:
      path.unlink()


def free_bytes(folder: epath.Path) -> int | None:
  """Free space, None where that is not known."""
  if not is_local(folder):
    return None
  try:
    return shutil.disk_usage(folder).free
  except OSError:
    return None


def reason(error: BaseException) -> str:
  """What a person needs of it; TensorStore's texts run to pages."""
  if isinstance(error, UserError):
    return str(error)
  text = " ".join(str(error).split())
  system = re.search(r"os_error_code='(\d+)'", text)
  if system:
    return os.strerror(int(system[1]))
  return f"{type(error).__name__}: {text[:400]}"


def size_text(n: int) -> str:
  """Bytes for people: 1.5 MB."""
  for unit in ("bytes", "kB", "MB", "GB"):
    if n < 1000:
      return f"{n} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
    n /= 1000
  return f"{n:.1f} TB"
