# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints while training goes on, and retiring old ones."""

import contextlib
import json
import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any, Self, TypeVar

from moejax.checkpoint import (
  arrays,
  files,
  layout,
  leaves,
  processes,
  shares,
)
from moejax.checkpoint.manifest import ARRAYS, META, Manifest
from moejax.checkpoint.reader import CheckpointReader
from moejax.config import CheckpointConfig
from moejax.errors import CheckpointError, StuckError

logger = logging.getLogger(__name__)

T = TypeVar("T")
THREAD = "moejax-checkpoint"


class Checkpointer(CheckpointReader):
  """Saves, keeps and restores the checkpoints of one run.

  Only the holder of the run's lock may make one, as it removes what a dead run
  left unfinished; everybody else uses `CheckpointReader`. With several
  processes each makes one, and all call the same methods.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    keep_last: int,
    keep_every: int = 0,
    before_commit: Callable[[], None] | None = None,
    timeout: float = CheckpointConfig.timeout,
    before_begin: Callable[[], None] | None = None,
  ):
    """Makes the folder and removes unfinished steps from it.

    Args:
      directory: where the steps are; local or gs://.
      keep_last: how many of the newest stay.
      keep_every: multiples of this stay for good; 0 is none.
      before_commit: called when all files of a step are written, by the first
        process, in the background; what it raises fails the save.
      timeout: seconds that a save may take.
      before_begin: called before anything of a step is written, by the first
        process; what it raises fails the save. What lies in the step's folder
        stays if one of both raises: it may be another run's.

    Raises:
      CheckpointError: the folder cannot be made or written.
      UserError: an address that Orbax writes no arrays to.
    """
    super().__init__(directory)
    files.require_writable(self.directory)
    self.keep_last, self.keep_every = keep_last, keep_every
    self._thread: threading.Thread | None = None
    self._error: CheckpointError | None = None
    self._commits = 0
    self._before_begin, self._before_commit = before_begin, before_commit
    self._may_remove = True
    self._timeout = timeout
    self._saving = 0, 0.0  # step, and when its save began
    arrays.load_orbax()
    if not processes.is_first():
      return
    try:
      if files.is_local(self.directory):
        self.directory.mkdir(parents=True, exist_ok=True)
      files.sync_folder(self.directory.parent)
      for step in layout.numbered(self.directory):
        if layout.kind(self._folder(step)) != layout.Kind.UNFINISHED:
          continue
        logger.warning(
          "removing the unfinished checkpoint of step %d in %s",
          step, self.directory,
        )  # fmt: skip
        layout.delete(self._folder(step))
    except OSError as e:
      raise CheckpointError(
        f"cannot write checkpoints to {self.directory}: {e.strerror or e}"
      ) from e

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Copies the state to the host, then writes it in the background.

    The state's buffers may be donated or changed as soon as this returns. A
    save that is still running is waited for.

    Args:
      step: finished optimizer steps; later than `latest()`.
      state: pytree of arrays; its top level is a dict, dataclass or tuple.
      meta: JSON to keep with it.

    Raises:
      CheckpointError: the save before this one failed (and this one was not
        begun), the step is not new, the state or meta cannot be stored, or the
        disk refused.
      StuckError: the save before this one does not end.
    """
    self.wait()
    step = operator.index(step)
    table = leaves.describe(state)
    if not table:
      raise CheckpointError("the state to save has no leaves")
    text = _to_json(meta)
    newest = self.latest()
    if newest is not None and step <= newest:
      raise CheckpointError(
        f"cannot save step {step}: {self.directory} holds step {newest}. Go on "
        "from that, or use another workdir"
      )
    needed = leaves.num_bytes(state)
    self._saving = step, time.monotonic()
    self._begin(step, text, needed)
    folder = self._folder(step) / ARRAYS
    try:
      saving = self._in_time(
        lambda: arrays.Saving(folder, state, self._timeout)
      )
    except StuckError:
      raise
    except Exception as e:
      raise self._failed(step, needed, e) from e
    self._thread = threading.Thread(
      target=self._finish,
      args=(step, saving, table, needed),
      name=THREAD,
      daemon=True,  # waited for below, and not for ever
    )
    self._thread.start()

  def check(self) -> None:
    """Raises, once, the CheckpointError of a background save that failed.

    Takes microseconds; meant for every step. Saving may go on after it, unless
    it is a StuckError.
    """
    if self.has_failed():
      error, self._error = self._error, None
      raise error

  def has_failed(self) -> bool:
    """Whether `check` has an error to raise; raises StuckError itself."""
    if self._thread is not None and self._seconds_left() <= 0:
      self._wait_or_give_up()
    return self._error is not None

  def wait(self) -> None:
    """Waits for the running save; raises as `check` does."""
    if self._thread is not None:
      self._wait_or_give_up()
    self.check()

  def _seconds_left(self) -> float:
    return self._saving[1] + self._timeout - time.monotonic()

  def _wait_or_give_up(self) -> None:
    thread, self._thread = self._thread, None
    thread.join(max(self._seconds_left(), 0))
    if thread.is_alive():
      raise StuckError(
        f"saving step {self._saving[0]} to {self.directory} has not ended "
        f"after {self._timeout:g} s (checkpoint.timeout): look at its disk, "
        "and at the memory that is left; the same command goes on from the "
        "newest checkpoint"
      )

  def close(self) -> None:
    """The same as `wait`."""
    self.wait()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except StuckError:
      if error is not None:
        logger.error("%s", error)
      raise
    except CheckpointError as e:
      if error is None:
        raise
      logger.error("%s", e)  # the error on its way is the one to report

  def _in_time(self, work: Callable[[], T]) -> T:
    """What `work` returns or raises; StuckError if the disk hangs in it."""
    done: futures.Future[T] = futures.Future()

    def run() -> None:
      try:
        done.set_result(work())
      except BaseException as e:
        done.set_exception(e)

    self._thread = threading.Thread(target=run, name=THREAD, daemon=True)
    self._thread.start()
    self._wait_or_give_up()
    return done.result()

  def _begin(self, step: int, meta: str, needed: int) -> None:
    """Makes the step's folder with all but the arrays."""

    def write() -> None:
      self._ask(self._before_begin)
      self._make_room(step)
      layout.begin(self._folder(step))
      files.write_text(self._folder(step) / META, meta)

    failure: Exception | None = None
    try:
      if processes.is_first():
        self._in_time(write)
    except StuckError:
      raise
    except Exception as e:
      failure = e
    if not processes.all_true(failure is None):
      failure = failure or CheckpointError("process 0 could not begin it")
      raise self._failed(step, needed, failure) from failure

  def _finish(
    self,
    step: int,
    saving: arrays.Saving,
    table: Mapping[str, leaves.Leaf],
    needed: int,
  ) -> None:
    """Waits for the arrays, then commits; the background thread's body."""
    try:
      self._commit(step, table, saving.finish())
    except BaseException as e:
      self._error = self._failed(step, needed, e)

  def _commit(
    self,
    step: int,
    table: Mapping[str, leaves.Leaf],
    failure: BaseException | None,
  ) -> None:
    """Digests all files and makes the step exist.

    Each process comes to both barriers, whatever has failed, so that all of
    them learn of it.
    """
    self._commits += 1
    folder, digests = self._folder(step), {}
    try:
      if failure is None:
        digests = shares.digest(folder)
    except BaseException as e:
      failure = e
    if failure is not None:
      shares.tell_failure(folder, failure)
    processes.barrier(f"moejax_digests_{self._commits}", self._timeout)
    if processes.is_first():
      try:
        # It says more than what Orbax missed here because of it.
        failure = shares.told_failure(folder) or failure
        if failure is not None:
          raise failure
        digests |= shares.collect(folder)
        self._ask(self._before_commit)
        layout.commit(folder, Manifest(step, table, digests).to_text())
        self._damaged.pop(step, None)
        self._retire(step)
      except BaseException as e:
        failure = e
    processes.barrier(f"moejax_committed_{self._commits}", self._timeout)
    if failure is not None:
      raise failure
    if not self._is_committed(step):
      raise CheckpointError("another process could not write its part")
    self._damaged.pop(step, None)
    self._intact.add(step)

  def _ask(self, hook: Callable[[], None] | None) -> None:
    """Whether this run may still write here; if not, it may not remove either.

    What lies there may be of the run that took the place over.
    """
    if hook is None:
      return
    try:
      hook()
    except BaseException:
      self._may_remove = False
      raise

  def _failed(
    self, step: int, needed: int, cause: BaseException
  ) -> CheckpointError:
    """Removes what there is of the step; returns the error to raise."""
    leftovers = ""
    if processes.is_first():
      # It may also have failed because another run removed what it wrote.
      with contextlib.suppress(Exception):
        self._ask(self._before_begin)
    if processes.is_first() and self._may_remove:
      try:
        layout.delete(self._folder(step))
      except OSError as e:
        leftovers = f"; its unfinished folder could not be removed: {e}"
    free = files.free_bytes(self.directory)
    space = (
      "" if free is None else f", {files.size_text(free)} are free on its disk"
    )
    message = (
      f"saving step {step} to {self.directory} failed: {files.reason(cause)}; "
      f"it needs about {files.size_text(needed)}{space}{leftovers}"
    )
    error = CheckpointError(message)
    error.__cause__ = cause
    return error

  def _make_room(self, step: int) -> None:
    """Clears the step's folder of what is there and is no checkpoint."""
    folder = self._folder(step)
    match layout.kind(folder):
      case layout.Kind.STRAY:
        moved = layout.move_aside(folder)
        logger.warning("%s was in the way; moved it to %s", folder, moved)
      case layout.Kind.COMMITTED | layout.Kind.UNFINISHED:
        # `save` has made sure that a committed one is damaged.
        logger.warning("replacing the damaged checkpoint %s", folder)
        layout.delete(folder)

  def _retire(self, newest: int) -> None:
    """Deletes what retention does not keep, and damaged steps passed by."""
    try:
      good = self.steps()
      kept = set(good[-self.keep_last :]) | {newest}
      if self.keep_every:
        kept |= {step for step in good if step % self.keep_every == 0}
      damaged = {step for step in list(self._damaged) if step < newest}
      for step in sorted((set(good) | damaged) - kept):
        layout.delete(self._folder(step))
        self._damaged.pop(step, None)
    except Exception as e:  # the new step is whole all the same
      logger.warning("could not delete an old checkpoint: %s", e)


def _to_json(meta: Mapping[str, Any]) -> str:
  try:
    text = json.dumps(meta, indent=1, sort_keys=True, allow_nan=False)
  except (TypeError, ValueError) as e:
    raise CheckpointError(f"the checkpoint's meta is not JSON: {e}") from e
  return text + "\n"
