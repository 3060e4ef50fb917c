# SPDX-License-Identifier: Apache-2.0
"""A compiler that aborts ends a process; here, not this one."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax


class Crashed(Exception):
  """The process ended without a result."""


def run_apart(function: Callable[..., Any], *args: Any) -> Any:
  """`function(*args)` in a process of its own, on a CPU.

  Args:
    function, args: as pickle can take them along; so must be what comes back.

  Raises:
    Crashed: the process aborted.
    Whatever the function raises.
  """
  context = multiprocessing.get_context("spawn")
  with ProcessPoolExecutor(1, context, _prepare) as pool:
    try:
      return pool.submit(function, *args).result()
    except BrokenProcessPool as e:
      raise Crashed from e


def _prepare() -> None:
  jax.config.update("jax_platforms", "cpu")  # no chip is used
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A killed command leaves no compiler at work."""
  multiprocessing.parent_process().join()
  os._exit(1)
