# SPDX-License-Identifier: Apache-2.0
"""Object stores (gs://, s3://): whole objects, and trying again.

There are no folders and no renames there, but writing one object is atomic:
readers see the one before or the new one, whole. Libraries do the work (fsspec
with gcsfs or s3fs, which find credentials by themselves); this adds patience
with what passes, and one kind of error for what does not.
"""

import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from moejax.errors import UserError

# Scheme: the package that knows it, the extra of moejax that installs it.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Seconds for which an operation is tried again, on top of what libraries do.
PATIENCE = 120.0
FIRST_DELAY, LONGEST_DELAY = 1.0, 30.0
PASSING = frozenset((408, 429, 500, 502, 503, 504))  # HTTP; others do not pass
# Whose exceptions are about the store, whatever their base class.
LIBRARIES = frozenset(
  ("gcsfs", "s3fs", "fsspec", "aiohttp", "requests", "google", "botocore",
   "aiobotocore")
)  # fmt: skip

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class StorageError(UserError, OSError):
  """An object store did not do what it was asked; `strerror` says why."""

  def __init__(self, message: str):
    super().__init__(message)
    self.strerror = message


def address(path: str | os.PathLike) -> str | None:
  """The address that a path is, without a slash at its end; None for a folder.

  Also of one that went through `pathlib`, which takes one of two slashes away.
  """
  text = os.fspath(path)
  for scheme in SCHEMES:
    for start in (f"{scheme}://", f"{scheme}:/"):
      if text.startswith(start):
        return f"{scheme}://{text.removeprefix(start).strip('/')}"
  if re.match(r"\w+://", text):
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    raise UserError(
      f"{text} is an address of no known store; known are {known}"
    )
  return None


def require_folder(path: str | os.PathLike, what: str) -> None:
  """Refuses an address.

  Args:
    path: to look at.
    what: needs a folder, as the message says it.

  Raises:
    UserError: it is one.
  """
  if found := address(path):
    raise UserError(f"{found}: {what} must be a folder of this machine")


def require_backend(found: str) -> None:
  """Refuses an address whose library is not installed."""
  _filesystem(found)


def retried(function: Callable[P, T]) -> Callable[P, T]:
  """The function, tried again with growing pauses for what may pass.

  Timeouts, lost connections and the statuses of `PASSING` are; that a thing is
  not there or not allowed is not. The first failure of a call is a warning.

  Args:
    function: its first argument is the path that messages name.

  Raises:
    StorageError: it did not pass, or cannot. Exceptions of libraries have no
      base in common.
    FileNotFoundError, FileExistsError: as they come.
  """

  @functools.wraps(function)
  def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
    end, delay, said = time.monotonic() + PATIENCE, FIRST_DELAY, False
    while True:
      try:
        return function(*args, **kwargs)
      except Exception as e:
        if not _is_of_store(e):
          raise
        if not _passes(e) or time.monotonic() >= end:
          raise StorageError(f"{args[0]}: {reason(e)}") from e
        if not said:
          logger.warning(
            "%s: %s; trying again for up to %.0f s",
            args[0], reason(e), PATIENCE,
          )  # fmt: skip
          said = True
      time.sleep(delay * random.uniform(0.5, 1.0))
      delay = min(2 * delay, LONGEST_DELAY)

  return wrapped


@retried
def read(path: str) -> bytes:
  """An object's content; FileNotFoundError if it is not there."""
  return _filesystem(path).cat_file(path)


@retried
def write(path: str, data: bytes, new: bool = False) -> None:
  """Writes a whole object or nothing.

  Args:
    path: its address.
    data: its content.
    new: raises FileExistsError if there is one. After a lost answer that may
      be this very call's: compare what is there.
  """
  mode = "create" if new else "overwrite"
  try:
    _filesystem(path).pipe_file(path, data, mode=mode)
  except FileNotFoundError:
    raise StorageError(f"{path}: there is no such bucket; make it") from None


@retried
def download(path: str, target: os.PathLike) -> None:
  """Copies an object to a file, which is not whole before this returns."""
  _filesystem(path).get_file(path, os.fspath(target))


@retried
def upload(source: os.PathLike, path: str) -> None:
  """Copies a file that nobody writes to; whole or not at all."""
  _filesystem(path).put_file(os.fspath(source), path)


@retried
def remove(path: str) -> None:
  """Removes an object if it is there."""
  try:
    _filesystem(path).rm_file(path)
  except FileNotFoundError:
    return


@retried
def remove_all(path: str) -> None:
  """Removes all objects below, in no order."""
  fs = _filesystem(path)
  try:
    if found := _found(fs, path):
      fs.rm(list(found))
  except FileNotFoundError:
    return  # somebody else was quicker with one of them


@retried
def names(path: str) -> list[str]:
  """What a folder would list: last parts, of objects and of those below."""
  fs = _filesystem(path)
  try:
    entries = fs.ls(path, detail=True)
  except FileNotFoundError:
    return []
  own = fs._strip_protocol(path).rstrip("/")
  found = [entry["name"].rstrip("/") for entry in entries]
  return sorted(name.rpartition("/")[2] for name in found if name != own)


@retried
def sizes(path: str) -> dict[str, int]:
  """Bytes of all objects below, by name relative to the path."""
  fs = _filesystem(path)
  return {
    name.removeprefix(fs._strip_protocol(path).rstrip("/") + "/"): entry["size"]
    for name, entry in _found(fs, path).items()
  }


def reason(error: BaseException) -> str:
  """One line of what a person needs of it."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = " ".join(str(error).split())[:300]
  status = _status(error)
  shown = f"HTTP {status}" if status else type(error).__name__
  return f"{shown}: {text}" if text else shown


def _found(fs: Any, path: str) -> dict[str, dict[str, Any]]:
  try:
    return fs.find(path, detail=True)
  except FileNotFoundError:
    return {}


def _filesystem(path: str) -> Any:
  """The fsspec filesystem of an address, the same object that epath has.

  Raises:
    UserError: its library is not installed.
  """
  scheme = path.partition("://")[0]
  package, extra = SCHEMES[scheme]
  set_up_libraries()
  import fsspec

  try:
    if scheme == "gs":
      return fsspec.filesystem("gcs", finalize_on_close=True)
    return fsspec.filesystem(scheme)
  except ImportError as e:
    raise UserError(
      f"{path} needs {package}, which is not installed ({e}): pip install "
      f"'moejax[{extra}]'"
    ) from None


@functools.cache
def set_up_libraries() -> None:
  """To be called before the first path of an object store is looked at.

  Listings are asked for each time, as others write there too; and errors are
  told once, by who gets them, not also as tracebacks of gcsfs.
  """
  import fsspec.config

  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

  for protocol in ("gcs", "gs", "s3"):
    options = fsspec.config.conf.setdefault(protocol, {})
    options.setdefault("use_listings_cache", False)


def _is_of_store(error: BaseException) -> bool:
  answers = FileNotFoundError, FileExistsError, IsADirectoryError, UserError
  if isinstance(error, answers):
    return False
  package = type(error).__module__.partition(".")[0]
  return package in LIBRARIES or isinstance(error, OSError)


def _passes(error: BaseException) -> bool:
  if isinstance(error, (TimeoutError, ConnectionError)):
    return True
  if status := _status(error):
    return status in PASSING
  name = type(error).__name__
  return type(error).__module__.partition(".")[0] in LIBRARIES and any(
    word in name for word in ("Connect", "Connection", "Timeout", "Disconnect",
                              "ProxyError", "ChecksumError", "PayloadError")
  )  # fmt: skip


def _status(error: BaseException | None) -> int | None:
  """The HTTP status that an error, or what it was made of, carries."""
  while error is not None:
    for name in ("code", "status", "status_code"):
      found = str(vars(error)[name]) if name in vars(error) else ""
      if found.isdecimal():
        return int(found)
    if "response" in vars(error) and isinstance(error.response, dict):
      answer = error.response["ResponseMetadata"]
      if "HTTPStatusCode" in answer:
        return answer["HTTPStatusCode"]
    error = error.__cause__
  return None
