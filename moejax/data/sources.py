# SPDX-License-Identifier: Apache-2.0
"""Where text comes from: files, the Python standard library, or TFDS.

A source is a list of files, each divided into units that can be read on their
own (a document, a range of lines, a row group), so that processes can share the
work and an interrupted run goes on where it was. `formats.py` reads the units.
"""

import abc
import concurrent.futures
import dataclasses
import glob
import hashlib
import os
import pathlib
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moejax.data import formats
from moejax.data.formats import Document
from moejax.errors import DataError

STDLIB = "python-stdlib"
_SKIPPED_FOLDERS = frozenset(
  {"__pycache__", "site-packages", "test", "tests", "idle_test"}
)
_HASH_THREADS = 4
_HASH_CHUNK = 4 << 20


@dataclasses.dataclass(frozen=True)
class Slice:
  """Units [start, stop) of file number `file`."""

  file: int
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class FileUnits:
  """How a file divides: `count` units of about `unit_bytes` bytes of text."""

  count: int
  unit_bytes: float


class Source(abc.ABC):
  """Documents in a fixed order.

  Attributes:
    identity: what makes it another source than others, before looking at its
      content: names the folder of its token store.
    slug: a short name for folders.
    names: the files, relative to the source's root, in order.
  """

  identity: str
  slug: str
  names: list[str]

  @abc.abstractmethod
  def path(self, name: str) -> pathlib.Path:
    """Where the file of that name lies."""

  @abc.abstractmethod
  def units(self) -> list[FileUnits]:
    """How each file divides."""

  @abc.abstractmethod
  def documents(self, piece: Slice) -> Iterator[Document]:
    """The documents of some units, in order."""

  def digests(
    self, known: dict[str, dict[str, Any]], advance: Callable[[int], None]
  ) -> dict[str, dict[str, Any]]:
    """Size, time and SHA-256 of each file.

    Args:
      known: an earlier answer; files with the same size and time of change are
        not read again.
      advance: told the bytes of each file that is done.
    """

    def digest(name: str) -> dict[str, Any]:
      path = self.path(name)
      try:
        stat = path.stat()
        entry = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if name in known and entry.items() <= known[name].items():
          return known[name]
        entry["sha256"] = file_digest(path)
      except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from None
      return entry

    with concurrent.futures.ThreadPoolExecutor(_HASH_THREADS) as pool:
      entries = {}
      for name, entry in zip(self.names, pool.map(digest, self.names)):
        entries[name] = entry
        advance(entry["size"])
    return entries


class FileSource(Source):
  """Files of text; see `formats.SUFFIXES`."""

  def __init__(
    self, identity: str, root: pathlib.Path, names: Sequence[str], text_key: str
  ):
    self.identity = identity
    self.slug = _slug(identity)
    self.root = root
    self.names = list(names)
    self.text_key = text_key

  def path(self, name: str) -> pathlib.Path:
    return self.root / name

  def units(self) -> list[FileUnits]:
    return [FileUnits(*formats.count_units(self.path(n))) for n in self.names]

  def documents(self, piece: Slice) -> Iterator[Document]:
    path = self.path(self.names[piece.file])
    yield from formats.read_units(path, piece.start, piece.stop, self.text_key)


class TfdsSource(Source):
  """A TFDS dataset; its files are ArrayRecord shards, a unit is an example."""

  def __init__(self, spec: str, builder: Any, split: str, text_key: str):
    self.identity = spec
    self.slug = _slug(spec)
    self.text_key = text_key
    self.split = split
    try:
      self._examples = builder.as_data_source(split)
    except Exception as e:  # TFDS has no common base of its errors
      raise DataError(f"{spec}: {_first_line(e)}") from None
    info = builder.info.splits[split]
    if text_key not in builder.info.features:
      raise DataError(
        f"{spec} has no field {text_key!r}; set data.text_key to one of "
        f"{', '.join(sorted(builder.info.features))}"
      )
    self._paths = {
      os.path.basename(f.filename): pathlib.Path(f.filename)
      for f in info.file_instructions
    }
    self.names = list(self._paths)
    self._bytes = sum(path.stat().st_size for path in self._paths.values())

  def path(self, name: str) -> pathlib.Path:
    return self._paths[name]

  def units(self) -> list[FileUnits]:
    count = len(self._examples)
    # All units are counted on the first shard: an index is enough to read one.
    first = FileUnits(count, self._bytes / max(1, count))
    return [first] + [FileUnits(0, 0.0)] * (len(self.names) - 1)

  def documents(self, piece: Slice) -> Iterator[Document]:
    for index in range(piece.start, piece.stop):
      try:
        value = self._examples[index][self.text_key]
      except Exception as e:
        raise DataError(
          f"{self.identity}: example {index} is unreadable: {_first_line(e)}"
        ) from None
      yield formats.document(value, f"{self.identity}, example {index}")


def open_source(spec: str, text_key: str) -> Source:
  """The source that one entry of `data.sources` names.

  Raises:
    DataError: nothing there, nothing readable in it, or no such dataset.
  """
  if spec == STDLIB:
    return _stdlib()
  if spec.startswith("tfds:"):
    return _open_tfds(spec, text_key)
  root, names = _find_files(spec)
  return FileSource(os.path.normpath(spec), root, names, text_key)


def identity(spec: str) -> str:
  """What `open_source(spec).identity` would be, without needing the files."""
  if spec == STDLIB:
    return f"{STDLIB}-{platform.python_version()}"
  return spec if spec.startswith("tfds:") else os.path.normpath(spec)


def slug(spec: str) -> str:
  """A short name of the source for folders."""
  return _slug(identity(spec))


def metric_names(specs: Sequence[str]) -> tuple[str, ...]:
  """A short name of each source for metrics; equal ones get numbers."""
  slugs = [slug(spec) for spec in specs]
  return tuple(
    name if slugs.count(name) == 1 else f"{name}.{number}"
    for number, name in enumerate(slugs)
  )


def file_digest(path: pathlib.Path) -> str:
  """SHA-256 of a file, hexadecimal."""
  digest = hashlib.sha256()
  with open(path, "rb") as f:
    while chunk := f.read(_HASH_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def plan_parts(
  units: Sequence[FileUnits], part_bytes: float
) -> list[list[Slice]]:
  """Divides all units into parts of about `part_bytes` bytes, in order."""
  parts: list[list[Slice]] = [[]]
  room = part_bytes
  for number, file in enumerate(units):
    start = 0
    while start < file.count:
      fits = file.count - start
      if file.unit_bytes > 0:
        fits = min(fits, max(1, round(room / file.unit_bytes)))
      parts[-1].append(Slice(number, start, start + fits))
      start += fits
      room -= fits * file.unit_bytes
      if room <= 0:
        parts.append([])
        room = part_bytes
  return [part for part in parts if part]


def _stdlib() -> FileSource:
  root = pathlib.Path(sysconfig.get_paths()["stdlib"])
  names = _walk(root, (".py",), _SKIPPED_FOLDERS)
  if not names:
    raise DataError(
      f"this Python has no standard-library sources under {root}; name other "
      "data.sources"
    )
  return FileSource(identity(STDLIB), root, names, "")


def _find_files(spec: str) -> tuple[pathlib.Path, list[str]]:
  """(root folder, sorted names) of a file, folder or glob."""
  suffixes = ", ".join(formats.SUFFIXES)
  path = pathlib.Path(spec)
  if path.is_file():
    if not formats.is_readable(path.name):
      raise DataError(f"{spec} is none of {suffixes}; convert it first")
    return path.parent, [path.name]
  if path.is_dir():
    names = _walk(path, formats.SUFFIXES)
    if not names:
      raise DataError(f"{spec} has no files of {suffixes} in it")
    return path, names
  if glob.has_magic(spec):
    found = [p for p in glob.glob(spec, recursive=True) if os.path.isfile(p)]
    found = [p for p in found if formats.is_readable(p)]
    if not found:
      raise DataError(f"no file of {suffixes} matches {spec!r}")
    root = os.path.commonpath([os.path.dirname(p) or "." for p in found])
    names = [pathlib.Path(os.path.relpath(p, root)).as_posix() for p in found]
    return pathlib.Path(root), sorted(names)
  raise DataError(
    f"data source {spec!r} is not there; name {STDLIB}, tfds:NAME, or a file, "
    f"folder or glob of {suffixes}"
  )


def _walk(
  root: pathlib.Path,
  suffixes: Sequence[str],
  skipped: frozenset[str] = frozenset({"__pycache__"}),
) -> list[str]:
  """Relative names of the files below, sorted; hidden ones left out."""
  names = []
  for folder, subfolders, files in os.walk(root):
    subfolders[:] = [
      s for s in subfolders if s not in skipped and not s.startswith(".")
    ]
    names += [
      pathlib.Path(folder, f).relative_to(root).as_posix()
      for f in files
      if f.endswith(tuple(suffixes)) and not f.startswith(".")
    ]
  return sorted(names)


def _open_tfds(spec: str, text_key: str) -> TfdsSource:
  """`tfds:NAME[/CONFIG][:SPLIT]`, or a prepared folder in place of the name."""
  import tensorflow_datasets as tfds

  name, _, split = spec.removeprefix("tfds:").partition(":")
  split = split or "train"
  try:
    if os.path.isdir(name):
      builder = tfds.builder_from_directory(name)
    else:
      builder = tfds.builder(name, file_format="array_record")
      if not builder.data_path.exists():
        builder.download_and_prepare()
  except Exception as e:  # TFDS has no common base of its errors
    raise DataError(
      f"{spec}: cannot open or prepare this TFDS dataset: {_first_line(e)}"
    ) from None
  return TfdsSource(spec, builder, split, text_key)


def _slug(identity: str) -> str:
  parts = re.split(r"[/\\]", identity.removeprefix("tfds:"))
  words = [re.sub(r"[^A-Za-z0-9.-]+", "_", part).strip("_.-") for part in parts]
  words = [word for word in words if word]
  return "_".join(words[-2:])[-48:] or "source"


def _first_line(error: Exception) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return f"{type(error).__name__}: {lines[0] if lines else ''}"


def text_digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()
