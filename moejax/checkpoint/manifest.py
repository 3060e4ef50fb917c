# SPDX-License-Identifier: Apache-2.0
"""The list of a checkpoint's files with sizes and digests: its commit marker.

The digest covers the manifest too: its text has to be exactly what writing its
own contents gives, checksum included, so no flipped bit passes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from etils import epath

from moejax.checkpoint import files
from moejax.checkpoint.leaves import Leaf
from moejax.errors import CheckpointError

NAME = "manifest.json"
# What a step's manifest is called while the step is written or deleted.
UNFINISHED = "manifest.json.tmp"
META = "meta.json"
ARRAYS = "arrays"
FORMAT = 2


class Damage(Exception):
  """A checkpoint is not what was written; says which file, and what it has."""

  def __init__(self, file: str, reason: str):
    super().__init__(f"{file}: {reason}")


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a whole checkpoint consists of."""

  step: int
  leaves: Mapping[str, Leaf]
  files: Mapping[str, tuple[int, str]]  # relative name -> (bytes, XXH3)

  def to_text(self) -> str:
    body = {
      "format": FORMAT,
      "step": self.step,
      "leaves": {
        name: [leaf.dtype, list(leaf.shape)]
        for name, leaf in self.leaves.items()
      },
      "files": {name: list(entry) for name, entry in self.files.items()},
    }
    return _with_checksum(body)

  @classmethod
  def read(cls, folder: epath.Path) -> Self:
    """The manifest of a step's folder.

    Raises:
      Damage: missing, unreadable, changed, or of another step.
      CheckpointError: intact, but of another format.
    """
    try:
      text = files.read_bytes(folder / NAME).decode()
    except FileNotFoundError:
      raise Damage(NAME, "missing") from None
    except (OSError, UnicodeDecodeError) as e:
      raise Damage(NAME, f"unreadable ({e})") from e
    manifest = cls._parse(text)
    if str(manifest.step) != folder.name:
      raise Damage(NAME, f"belongs to step {manifest.step}")
    return manifest

  @classmethod
  def _parse(cls, text: str) -> Self:
    try:
      data = json.loads(text)
      body = {key: value for key, value in data.items() if key != "sha256"}
      whole = _with_checksum(body) == text
    except (ValueError, AttributeError) as e:
      raise Damage(NAME, f"not a manifest ({e})") from e
    if not whole:
      raise Damage(NAME, "differs from its own checksum")
    if body["format"] != FORMAT:
      raise CheckpointError(
        f"a checkpoint of format {body['format']}; this moejax reads {FORMAT}"
      )
    return cls(
      step=body["step"],
      leaves={
        name: Leaf(tuple(shape), dtype)
        for name, (dtype, shape) in body["leaves"].items()
      },
      files={name: tuple(entry) for name, entry in body["files"].items()},
    )

  def check(
    self,
    folder: epath.Path,
    items: set[str] | None = None,
    part: tuple[int, int] = (0, 1),
  ) -> None:
    """Compares files with their digests.

    Args:
      folder: the step's folder.
      items: top-level keys whose files matter; None: all files.
      part: (i, n) reads every n-th file, for n processes that share the work.

    Raises:
      Damage: a file is missing, extra, of another size, changed, unreadable.
    """
    wanted = {n for n in self.files if _belongs(n, items)}
    found = {n for n in files.list_files(folder) if _belongs(n, items)}
    for name in sorted(wanted - found):
      raise Damage(name, "missing")
    for name in sorted(found - wanted):
      raise Damage(name, "is not in the manifest")
    names = sorted(wanted)[part[0] :: part[1]]
    for name, digest in files.digest_files(folder, names).items():
      self._check_digest(name, digest)

  def check_file(self, folder: epath.Path, name: str) -> None:
    """Compares one file; raises Damage."""
    if name not in self.files:
      raise Damage(name, "is not in the manifest")
    self._check_digest(name, files.digest_files(folder, [name])[name])

  def _check_digest(self, name: str, digest: tuple[int, str] | OSError) -> None:
    size, expected = self.files[name]
    if isinstance(digest, OSError):
      raise Damage(name, f"unreadable ({digest})")
    if digest[0] != size:
      raise Damage(name, f"{digest[0]} bytes instead of {size}")
    if digest[1] != expected:
      found = digest[1][:12]
      raise Damage(name, f"digest {found} instead of {expected[:12]}")


def _belongs(name: str, items: set[str] | None) -> bool:
  """Whether the file is read to restore the items."""
  if name in (NAME, UNFINISHED):
    return False
  first, _, rest = name.partition("/")
  if items is None or first != ARRAYS or "/" not in rest:
    return True
  return rest.partition("/")[0] in items


def _with_checksum(body: Mapping[str, Any]) -> str:
  checksum = hashlib.sha256(_dump(body).encode()).hexdigest()
  return _dump({**body, "sha256": checksum})


def _dump(data: Mapping[str, Any]) -> str:
  return json.dumps(data, indent=1, sort_keys=True) + "\n"
