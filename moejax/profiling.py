# SPDX-License-Identifier: Apache-2.0
"""A window of steps under JAX's profiler, for TensorBoard or XProf."""

import dataclasses
from pathlib import Path
from typing import Self

import jax

from moejax import storage
from moejax.errors import ConfigError

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class ProfileWindow:
  """Steps first..last, counted from 1."""

  first: int
  last: int

  @classmethod
  def parse(cls, text: str) -> Self:
    """`100:110`.

    Raises:
      ConfigError: anything else.
    """
    first, colon, last = text.partition(":")
    numbers = first.isascii() and last.isascii()
    if not (colon and numbers and first.isdecimal() and last.isdecimal()):
      raise ConfigError(f"--profile={text} must be FIRST:LAST, such as 100:110")
    window = cls(int(first), int(last))
    if not 1 <= window.first <= window.last:
      raise ConfigError(f"--profile={text}: steps from 1, the first one first")
    return window

  def __str__(self) -> str:
    return f"--profile={self.first}:{self.last}"

  def require_before(self, end: int) -> None:
    """Raises ConfigError: it begins after step `end`, the run's last."""
    if self.first > end:
      raise ConfigError(
        f"{self} begins after train.num_steps={end}; use a FIRST of at most "
        f"{end}"
      )

  def left(self, start: int, end: int, workdir: str | Path) -> Self | None:
    """What of it is in steps start + 1..end; prints what is not.

    None where it was before those and the run has a profile: the same command
    must go on with a run that was stopped after its window.

    Raises:
      ConfigError: it was before those, and there is no profile.
    """
    first, last = max(self.first, start + 1), min(self.last, end)
    if first > last:
      # What other hosts recorded is not looked for in an object store.
      if storage.address(workdir) or (Path(workdir) / FOLDER).exists():
        print(f"note: {self} is of steps that are done: nothing is recorded")
        return None
      raise ConfigError(
        f"{self}: the run has done {start} of {end} steps; use a window after "
        "them, or another --workdir"
      )
    if (first, last) != (self.first, self.last):
      print(
        f"note: {self} is cut to steps {first} to {last}: this launch runs "
        f"steps {start + 1} to {end}"
      )
    return dataclasses.replace(self, first=first, last=last)


class Profiler:
  """Starts and stops the profiler around the steps of a window."""

  def __init__(self, window: ProfileWindow | None, workdir: Path):
    self._window, self._folder = window, workdir / FOLDER
    self._running = False

  def before(self, step: int) -> None:
    """Called before a step is dispatched."""
    w = self._window
    if w is not None and not self._running and w.first <= step <= w.last:
      jax.profiler.start_trace(str(self._folder))
      self._running = True

  def after(self, step: int, result: object) -> str:
    """Called after it; at the window's end waits for it, and says where."""
    if not self._running or self._window is None or step < self._window.last:
      return ""
    jax.block_until_ready(result)
    return self.close()

  def finish(self, step: int) -> str:
    """Called at the run's last step: ends a window that it leaves early."""
    w = self._window
    if w is None or step >= w.last:
      return self.close()
    if not self._running:
      return f"profile: nothing recorded, the run stops before step {w.first}"
    return f"{self.close()}; it ends at step {step}, where the run stops"

  def close(self) -> str:
    """Ends the window, if one is open, and says where it is."""
    if not self._running:
      return ""
    jax.profiler.stop_trace()
    self._running = False
    return f"profile: {self._folder}; tensorboard --logdir opens it (XProf)"
