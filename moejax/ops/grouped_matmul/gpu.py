# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on a GPU: tokamax's kernels, else `lax.ragged_dot`.

Never run on a GPU by us; the Triton kernels are compiled for named cards, with
no card here, by `moejax plan`.
"""

import contextlib
import functools
import logging
import types
import warnings
from collections.abc import Iterator

import jax
import jax.numpy as jnp

_COST = "about 15% of an H100's peak where tokamax's kernel reaches 78%"
_FORWARD = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((1,), (1,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[0],
)
_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((1,), (2,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[0],
)
_CONTRACTED = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


def gmm(lhs_AD, rhs_EDF, group_sizes_E):
  """`lhs_AD @ rhs_EDF[group]` -> `[A, F]`; zeros beyond the last group."""
  out = _ragged_dot(lhs_AD, rhs_EDF, group_sizes_E, _FORWARD, lhs_AD.dtype)
  return _zero_beyond(out, group_sizes_E)


def gmm_transposed(d_out_AF, rhs_EDF, group_sizes_E):
  """`d_out_AF @ rhs_EDF[group].T` -> `[A, D]`; zeros beyond the last group."""
  out = _ragged_dot(
    d_out_AF, rhs_EDF, group_sizes_E, _TRANSPOSED, d_out_AF.dtype
  )
  return _zero_beyond(out, group_sizes_E)


def tgmm(lhs_AD, d_out_AF, group_sizes_E, dtype):
  """`lhs_AD[group].T @ d_out_AF[group]` -> `[E, D, F]`; zeros if empty."""
  # A kernel may multiply masked rows by zero, and 0 * nan is nan.
  return _ragged_dot(
    _zero_beyond(lhs_AD, group_sizes_E),
    _zero_beyond(d_out_AF, group_sizes_E),
    group_sizes_E,
    _CONTRACTED,
    dtype,
  )


def unavailable() -> str | None:
  """`lax.ragged_dot` is always there."""
  return None


@functools.cache
def slow() -> str | None:
  """Why the slow path is taken; None with tokamax."""
  try:
    import tokamax  # noqa: F401
  except ImportError as e:
    return (
      f"tokamax is missing ({e}), so lax.ragged_dot is used, {_COST}; "
      "pip install 'moejax[cuda]'"
    )
  return None


def _ragged_dot(x, y, group_sizes_E, dimensions, dtype):
  x, y = (v.astype(jnp.promote_types(x.dtype, y.dtype)) for v in (x, y))
  if not slow():
    try:
      with _tokamax() as (tokamax, implementation):
        # By name: left to itself, tokamax goes over to XLA without a word.
        return tokamax.ragged_dot_general(
          x,
          y,
          group_sizes_E,
          dimensions,
          preferred_element_type=dtype,
          implementation=implementation,
        )
    except (NotImplementedError, ValueError, ExceptionGroup) as e:
      # Newer versions do not know "triton" where jax-triton is missing.
      if isinstance(e, ValueError) and "Unknown implementation" not in str(e):
        raise
      reasons = "; ".join(map(str, getattr(e, "exceptions", [e])))
      warnings.warn(
        f"grouped_matmul: tokamax has no kernel for {x.dtype} {x.shape} x "
        f"{y.shape} here ({reasons}); lax.ragged_dot is used, {_COST}",
        stacklevel=2,
      )
  return jax.lax.ragged_dot_general(
    x, y, group_sizes_E, dimensions, preferred_element_type=jnp.float32
  ).astype(dtype)


@contextlib.contextmanager
def _tokamax() -> Iterator[tuple[types.ModuleType, tuple[str, ...]]]:
  """tokamax, told whether the GPU is here, and the kernels to try in turn."""
  import tokamax
  from absl import flags

  if not flags.FLAGS.is_parsed():  # it would take our command line for its own
    flags.FLAGS.mark_as_parsed()
  if jax.default_backend() == "gpu":
    yield tokamax, ("mosaic", "triton")
    return
  log = logging.getLogger("absl")
  level = log.level
  log.setLevel(logging.ERROR)  # that nothing is tuned for a CPU
  try:
    # Its Mosaic kernels ask the card that is here for its number of cores.
    with tokamax.config.cross_compile(True):
      yield tokamax, ("triton",)
  finally:
    log.setLevel(level)


def _zero_beyond(x, group_sizes_E):
  used_A1 = jnp.arange(x.shape[0])[:, None] < group_sizes_E.sum()
  return jnp.where(used_A1, x, 0)
