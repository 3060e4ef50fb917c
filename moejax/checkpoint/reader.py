# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints: the newest one whose every byte is what was written."""

import dataclasses
import json
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from moejax.checkpoint import arrays, files, layout, leaves, processes
from moejax.checkpoint.manifest import ARRAYS, META, Damage, Manifest
from moejax.checkpoint.streaming import LeafReader
from moejax.errors import CheckpointError

logger = logging.getLogger(__name__)

NONE = -1  # "no step", where processes agree on a number
# Folders: a process that opens one twice says it once.
_warned_of_strays: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint in memory."""

  step: int
  state: Any
  meta: dict[str, Any]


class CheckpointReader:
  """Reads a folder of checkpoints and changes nothing in it.

  A run may be writing to the folder meanwhile.
  """

  def __init__(self, directory: str | os.PathLike):
    """Args: directory: where the steps are; local or gs://; may be missing."""
    self.directory = files.folder_of(directory)
    if files.is_local(self.directory):
      self.directory = epath.Path(os.path.abspath(self.directory))
    # Steps that turned out not to be what was written, and why.
    self._damaged: dict[int, str] = {}
    self._intact: set[int] = set()  # manifests read before

  def steps(self) -> list[int]:
    """Steps that exist, ascending; a step found damaged does not."""
    self._warn_of_strays()
    numbered = reversed(layout.numbered(self.directory))
    return [step for step in numbered if self._exists(step)]

  def latest(self) -> int | None:
    """The newest of `steps()`."""
    numbered = layout.numbered(self.directory)
    return next((step for step in numbered if self._exists(step)), None)

  def is_empty(self) -> bool:
    """Whether nothing was ever saved; a damaged step is something."""
    return self._candidate({}) == NONE and not self._damaged

  def read_meta(self, step: int | None = None) -> dict[str, Any]:
    """The JSON that was saved with a step, without reading arrays.

    Args:
      step: None takes the newest whose JSON is intact.

    Raises:
      CheckpointError: no such step, or it is damaged.
    """
    found, manifest = self._find(step, lambda m, f: m.check_file(f, META))
    return self._read_meta(found, manifest)

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
    """Reads a whole state.

    Args:
      abstract_state: `jax.ShapeDtypeStruct`s with a sharding each (or arrays),
        in the structure to return. The mesh may differ from the writer's.
      step: None takes the newest intact one, and warns of each damaged one
        that it passes over.

    Raises:
      CheckpointError: no intact step, the wanted one is missing or damaged, or
        leaves differ in name, shape or dtype (all are listed).
    """
    return self._restore(abstract_state, step, whole=True)

  def restore_params(
    self, abstract_part: Any, step: int | None = None
  ) -> Restored:
    """Reads only some top-level keys of a state, such as `{"params": ...}`.

    The files of other keys, such as the optimizer's, are neither read nor
    checked, and floating-point leaves come in the dtype they are stored in.
    Other arguments and errors are those of `restore`.
    """
    return self._restore(abstract_part, step, whole=False)

  def open_leaves(
    self, items: Collection[str], step: int | None = None
  ) -> tuple[int, dict[str, Any], LeafReader]:
    """The newest intact step, or `step`, to be read leaf by leaf.

    Args:
      items: top-level keys whose files are checked.
      step: None takes the newest intact one.

    Returns:
      The step, its JSON and its leaves.

    Raises:
      CheckpointError: as `restore`.
    """
    found, manifest = self._find(step, lambda m, f: m.check(f, set(items)))
    reader = LeafReader(self._folder(found), manifest)
    return found, self._read_meta(found, manifest), reader

  def _restore(self, abstract: Any, step: int | None, whole: bool) -> Restored:
    items = {leaves.item_of(name) for name in leaves.named_leaves(abstract)}
    _require_shardings(abstract)

    def check(manifest: Manifest, folder: epath.Path) -> None:
      stored = manifest.leaves
      wanted = leaves.describe(abstract)
      if not whole:
        stored = {k: v for k, v in stored.items() if leaves.item_of(k) in items}
        wanted = leaves.describe(leaves.as_stored(abstract, stored))
      # Before the files are read: a misfit needs no minutes of hashing.
      leaves.compare(wanted, stored, f"checkpoint {folder}")
      part = processes.index_and_count()
      manifest.check(folder, None if whole else items, part)

    while True:
      found, manifest = self._find(step, check)
      try:
        meta = self._read_meta(found, manifest)
        if not whole:
          abstract = leaves.as_stored(abstract, manifest.leaves)
        state = arrays.restore(self._folder(found) / ARRAYS, abstract)
      except Exception as e:
        # A run may have retired the step meanwhile; it has a newer one then.
        # Several processes are the run itself.
        alone = processes.index_and_count()[1] == 1
        if alone and step is None and not self._is_committed(found):
          self._damaged[found] = "was deleted while it was read"
          continue
        raise CheckpointError(
          f"checkpoint {self._folder(found)} is intact but cannot be read: "
          f"{type(e).__name__}: {str(e)[:500]}"
        ) from e
      return Restored(found, state, meta)

  def _find(self, step: int | None, check: Any) -> tuple[int, Manifest]:
    """The wanted or newest step that passes `check(manifest, folder)`.

    All processes return the same one. `check` raises Damage to have a step
    passed over; other errors end the search.
    """
    self._warn_of_strays()
    tried: dict[int, str] = {}
    while True:
      candidate = self._candidate(tried) if step is None else step
      candidate = processes.from_first(candidate)
      if step is None and candidate == NONE:
        raise CheckpointError(self._none_message(tried))
      manifest, reason = self._examine(candidate, check)
      if processes.all_true(not reason):
        return candidate, manifest
      tried[candidate] = reason or "another process found it damaged"
      if step is not None:
        raise CheckpointError(self._unusable_message(step, tried[step]))
      if not self._is_committed(candidate):
        continue  # retired meanwhile
      self._damaged[candidate] = tried[candidate]
      logger.warning(
        "passing over the damaged checkpoint of step %d in %s: %s",
        candidate, self.directory, tried[candidate],
      )  # fmt: skip

  def _candidate(self, tried: Mapping[int, str]) -> int:
    for step in layout.numbered(self.directory):
      known = step in tried or step in self._damaged
      if not known and self._is_committed(step):
        return step
    return NONE

  def _examine(self, step: int, check: Any) -> tuple[Any, str]:
    """(manifest, "") of a step that passes, (None, reason) of another."""
    folder = self._folder(step)
    try:
      manifest = Manifest.read(folder)
      check(manifest, folder)
    except Damage as e:
      return None, str(e)
    return manifest, ""

  def _read_meta(self, step: int, manifest: Manifest) -> dict[str, Any]:
    return json.loads(files.read_bytes(self._folder(step) / META))

  def _none_message(self, tried: dict[int, str]) -> str:
    reasons = self._damaged | tried
    if not reasons:
      return f"no checkpoint in {self.directory}"
    listed = "".join(f"\n  step {s}: {reasons[s]}" for s in sorted(reasons))
    return f"no intact checkpoint in {self.directory}:{listed}"

  def _unusable_message(self, step: int, reason: str) -> str:
    available = [s for s in self.steps() if s != step]
    listed = ", ".join(map(str, available)) if available else "none"
    if self._is_committed(step):
      what = f"checkpoint {self._folder(step)} is damaged: {reason}"
    else:
      what = f"no checkpoint of step {step} in {self.directory}"
    return f"{what}; available steps: {listed}"

  def _warn_of_strays(self) -> None:
    if os.fspath(self.directory) in _warned_of_strays:
      return
    strays = layout.not_steps(self.directory) + [
      f"{step} (no manifest)"
      for step in layout.numbered(self.directory)
      if layout.kind(self._folder(step)) == layout.Kind.STRAY
    ]
    if strays:
      _warned_of_strays.add(os.fspath(self.directory))
      logger.warning(
        "ignoring what is no checkpoint in %s: %s",
        self.directory, ", ".join(strays),
      )  # fmt: skip

  def _exists(self, step: int) -> bool:
    if step in self._damaged or not self._is_committed(step):
      return False
    if step in self._intact:
      return True
    try:
      Manifest.read(self._folder(step))
    except Damage as e:
      if self._is_committed(step):
        self._damaged[step] = str(e)
        logger.warning(
          "ignoring the damaged checkpoint of step %d in %s: %s",
          step, self.directory, e,
        )  # fmt: skip
      return False
    self._intact.add(step)
    return True

  def _is_committed(self, step: int) -> bool:
    return layout.kind(self._folder(step)) == layout.Kind.COMMITTED

  def _folder(self, step: int) -> epath.Path:
    return self.directory / str(step)


def _require_shardings(abstract: Any) -> None:
  missing = [
    name
    for name, leaf in leaves.named_leaves(abstract).items()
    if getattr(leaf, "sharding", None) is None
  ]
  if missing:
    raise CheckpointError(
      f"{len(missing)} leaves to restore have no sharding, such as "
      f"{missing[0]!r}; give each jax.ShapeDtypeStruct one"
    )
