# SPDX-License-Identifier: Apache-2.0
"""A window of steps under JAX's profiler, for TensorBoard or XProf."""

import dataclasses
from pathlib import Path
from typing import Self

import jax

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

  def close(self) -> str:
    """Ends a window that the run leaves early."""
    if not self._running:
      return ""
    jax.profiler.stop_trace()
    self._running = False
    return f"profile: {self._folder}; tensorboard --logdir opens it (XProf)"
