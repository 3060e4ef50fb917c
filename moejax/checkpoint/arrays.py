# SPDX-License-Identifier: Apache-2.0
"""Arrays to and from disk: the only file that knows Orbax.

Each top-level key of a state is an item with a folder of its own, so that
parameters can be read, and their digests checked, without the optimizer's part.
"""

import logging
import math
import os
import threading
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from moejax.checkpoint import files, leaves, processes

# The name of a leaf that is itself a top-level key.
ALONE = "value"
# A leaf is cut into pieces of about this size, whole entries of its first axis.
CHUNK_BYTES = 64 << 20
_OTHERS = 10.0  # seconds that what goes on after a failure is waited for


def load_orbax() -> None:
  """Imports it now, as that takes a second or more."""
  import orbax.checkpoint  # noqa: F401


class Saving:
  """A state on its way to the disk.

  Making one copies the state to the host; its buffers are free to be donated.
  """

  # Barriers of an Orbax save, after which nothing waits for another process.
  BARRIERS = 2

  def __init__(self, folder: epath.Path, state: Any, timeout: float):
    """Starts to write `folder`; raises what Orbax does.

    Args:
      folder: to be made.
      state: pytree of arrays.
      timeout: seconds that processes wait for one another.
    """
    import orbax.checkpoint as ocp

    items = _to_items(state)
    handlers = {
      # Trained weights hardly compress: a few percent for twice the CPU time.
      name: ocp.PyTreeCheckpointHandler(use_compression=False)
      for name in items
    }
    self._passed, self._timeout = 0, timeout
    self._name = os.fspath(folder)
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(**handlers),
      async_options=ocp.AsyncOptions(
        # Twice: what hangs is told by whoever waits for this.
        timeout_secs=2 * math.ceil(timeout),
        barrier_sync_fn=self._barrier,
      ),
    )
    args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    try:
      self._checkpointer.save(folder, ocp.args.Composite(**args))
    except BaseException:
      self._checkpointer.close()
      _wait_for_others()
      raise

  def finish(self) -> BaseException | None:
    """Waits for the disk; returns what went wrong, on any process."""
    try:
      self._checkpointer.wait_until_finished()
      failure = None
    except BaseException as e:
      failure = e
      _wait_for_others()
    # The others wait at barriers that a failed process never gets to.
    while self._passed < self.BARRIERS:
      self._barrier(key="", timeout_ms=0)
    self._checkpointer.close()
    return failure

  def _barrier(self, *, key: str, timeout_ms: int) -> None:
    self._passed += 1
    processes.barrier(
      f"moejax_arrays_{self._name}_{self._passed}", self._timeout
    )


def _wait_for_others() -> None:
  """Orbax raises what fails first, while its threads write other items.

  They would write into what is removed now, and speak after the last word.
  """
  for thread in threading.enumerate():
    if type(thread).__module__.startswith("orbax."):
      thread.join(_OTHERS)


def restore(folder: epath.Path, abstract: Any) -> Any:
  """Reads the leaves of `abstract` into its structure and shardings."""
  import orbax.checkpoint as ocp

  items = _to_items(abstract)
  handlers = {name: ocp.PyTreeCheckpointHandler() for name in items}
  args = {
    name: ocp.args.PyTreeRestore(
      item=tree,
      restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
    )
    for name, tree in items.items()
  }
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
    restored = reader.restore(folder, ocp.args.Composite(**args))
  flat = [
    _get(restored, name.split("/")) for name in leaves.named_leaves(abstract)
  ]
  return jax.tree.unflatten(jax.tree.structure(abstract), flat)


def write_skeleton(folder: epath.Path, names: Iterable[str]) -> None:
  """Orbax's tree of these leaves, each a placeholder for `write_leaf`."""
  import orbax.checkpoint as ocp

  tree: dict[str, Any] = {}
  for name in names:
    *parents, last = _keys(name.split("/"))
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = np.zeros(1, np.float32)
  handlers = {
    item: ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    for item in tree
  }
  args = {item: ocp.args.PyTreeSave(node) for item, node in tree.items()}
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)  # it warns that there is nothing to merge
  try:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as writer:
      writer.save(folder, ocp.args.Composite(**args))
  finally:
    logger.setLevel(level)


def write_leaf(folder: epath.Path, name: str, array: np.ndarray) -> epath.Path:
  """Puts a leaf in its placeholder's place; returns the leaf's folder."""
  import tensorstore as ts

  item, *path = _keys(name.split("/"))
  target = folder / item / ".".join(path)
  row = max(1, array.nbytes // max(1, len(array)))
  rows = min(len(array), max(1, CHUNK_BYTES // row))
  store = ts.open(
    {
      "driver": "zarr",
      "kvstore": {"driver": "file", "path": f"{os.fspath(target)}/"},
      "metadata": {
        "chunks": [rows, *array.shape[1:]],
        "compressor": None,
        "dimension_separator": ".",
      },
      # Orbax takes a chunk that is not there for a damaged one.
      "store_data_equal_to_fill_value": True,
    },
    create=True, delete_existing=True, dtype=array.dtype, shape=array.shape,
  ).result()  # fmt: skip
  # Piece by piece: all at once, all would be copied at once.
  for start in range(0, len(array), rows):
    piece = array[start : start + rows]
    store[start : start + len(piece)].write(
      piece, can_reference_source_data_indefinitely=True
    ).result()
  return target


def read_leaf(
  folder: epath.Path, name: str, index: int | None = None
) -> np.ndarray:
  """A leaf of an item, or one entry of its first axis."""
  import tensorstore as ts

  item, *path = _keys(name.split("/"))
  base = f"{os.fspath(folder / item)}/"
  # TensorStore's own name for it, or its address.
  local: dict[str, Any] = {"driver": "file", "path": base}
  kvstore = local if files.is_local(folder) else base
  if (folder / item / "manifest.ocdbt").exists():
    kvstore = {"driver": "ocdbt", "base": kvstore}
  inside = {"driver": "zarr", "kvstore": kvstore, "path": ".".join(path)}
  store = ts.open(inside, open=True, read=True).result()
  return (store if index is None else store[index]).read().result()


def _to_items(state: Any) -> dict[str, Any]:
  """The state as nested dicts, which any Orbax reader understands."""
  items: dict[str, Any] = {}
  for name, leaf in leaves.named_leaves(state).items():
    *parents, last = _keys(name.split("/"))
    node = items
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return items


def _get(restored: Any, path: list[str]) -> jax.Array:
  item, *rest = _keys(path)
  node = restored[item]
  for key in rest:
    node = node[key]
  return node


def _keys(path: list[str]) -> list[str]:
  return path if len(path) > 1 else [*path, ALONE]
