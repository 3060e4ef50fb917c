# SPDX-License-Identifier: Apache-2.0
"""A compiler that aborts ends a process; here, not this one."""

import multiprocessing
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
  with ProcessPoolExecutor(1, context, _on_cpu) as pool:
    try:
      return pool.submit(function, *args).result()
    except BrokenProcessPool as e:
      raise Crashed from e


def _on_cpu() -> None:
  jax.config.update("jax_platforms", "cpu")  # no chip is used
