# SPDX-License-Identifier: Apache-2.0
"""Small text files that are whole or not there, and where caches lie."""

import os
import pathlib


def cache_folder(name: str) -> pathlib.Path:
  """A folder of this user for what can be made again; may not exist yet."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "moejax" / name


def write_atomically(path: str | os.PathLike, text: str) -> None:
  """Writes a file so that a crash or a full disk leaves the old one.

  A file that holds this text already is not touched.

  Raises:
    OSError: it cannot be written; nothing is left beside the old file.
  """
  path, data = pathlib.Path(path), text.encode()
  if path.is_file() and path.read_bytes() == data:
    return
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  try:
    with open(partial, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
