# SPDX-License-Identifier: Apache-2.0
"""Arrays to and from disk: the only file that knows Orbax.

Each top-level key of a state is an item with a folder of its own, so that
parameters can be read, and their digests checked, without the optimizer's part.
"""

import os
from typing import Any

import jax
from etils import epath

from moejax.checkpoint import leaves, processes

# The name of a leaf that is itself a top-level key.
ALONE = "value"


def load_orbax() -> None:
  """Imports it now, as that takes a second or more."""
  import orbax.checkpoint  # noqa: F401


class Saving:
  """A state on its way to the disk.

  Making one copies the state to the host; its buffers are free to be donated.
  """

  # Barriers of an Orbax save, after which nothing waits for another process.
  BARRIERS = 2

  def __init__(self, folder: epath.Path, state: Any):
    """Starts to write `folder`; raises what Orbax does."""
    import orbax.checkpoint as ocp

    items = _to_items(state)
    handlers = {
      # Trained weights hardly compress: a few percent for twice the CPU time.
      name: ocp.PyTreeCheckpointHandler(use_compression=False)
      for name in items
    }
    self._passed = 0
    self._name = os.fspath(folder)
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(**handlers),
      async_options=ocp.AsyncOptions(barrier_sync_fn=self._barrier),
    )
    args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    try:
      self._checkpointer.save(folder, ocp.args.Composite(**args))
    except BaseException:
      self._checkpointer.close()
      raise

  def finish(self) -> BaseException | None:
    """Waits for the disk; returns what went wrong, on any process."""
    try:
      self._checkpointer.wait_until_finished()
      failure = None
    except BaseException as e:
      failure = e
    # The others wait at barriers that a failed process never gets to.
    while self._passed < self.BARRIERS:
      self._barrier(key="", timeout_ms=0)
    self._checkpointer.close()
    return failure

  def _barrier(self, *, key: str, timeout_ms: int) -> None:
    self._passed += 1
    processes.barrier(f"moejax_arrays_{self._name}_{self._passed}")


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
