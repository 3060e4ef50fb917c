# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on a TPU: megablox, with tiles chosen from the sizes.

`lax.ragged_dot` is not used: only for v5p does the compiler make a grouped
kernel of it, and there megablox is as fast; elsewhere it is E times the work.
"""

import importlib
import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp

_LANES, _SUBLANES = 128, 16
# The compiler gives a kernel 16 MiB of VMEM (v4, v5); what is left over holds
# the masks and the product before it is added.
_VMEM_BYTES = int(12.5 * 2**20)
# Between v5p and v6e; only the ratios matter for the choice. Loading a weight
# tile into the matrix unit takes as long as so many rows (a guess, unmeasured).
_FLOPS, _BYTES, _STEP_SECONDS, _LOAD_ROWS = 4.5e14, 1.6e12, 3.5e-7, 96


class Tiles(NamedTuple):
  m: int
  k: int
  n: int


def gmm(lhs_AD, rhs_EDF, group_sizes_E, interpret=False):
  """`lhs_AD @ rhs_EDF[group]` -> `[A, F]`; zeros beyond the last group."""
  return _gmm(lhs_AD, rhs_EDF, group_sizes_E, False, interpret)


def gmm_unzeroed(lhs_AD, rhs_EDF, group_sizes_E, interpret=False):
  """`gmm`, but rows beyond the last group hold anything."""
  return _product(lhs_AD, rhs_EDF, group_sizes_E, False, interpret)


def gmm_transposed(d_out_AF, rhs_EDF, group_sizes_E, interpret=False):
  """`d_out_AF @ rhs_EDF[group].T` -> `[A, D]`; zeros beyond the last group."""
  return _gmm(d_out_AF, rhs_EDF, group_sizes_E, True, interpret)


def tgmm(lhs_AD, d_out_AF, group_sizes_E, dtype, interpret=False):
  """`lhs_AD[group].T @ d_out_AF[group]` -> `[E, D, F]`; zeros if empty."""
  (m, k), n = lhs_AD.shape, d_out_AF.shape[1]
  lhs_AD, d_out_AF = _one_type(lhs_AD, d_out_AF)
  tiles = choose_tiles(m, k, n, len(group_sizes_E), lhs_AD.dtype, True)
  return _megablox().tgmm(
    _pad(lhs_AD, tiles.m).T,
    _pad(d_out_AF, tiles.m),
    group_sizes_E,
    dtype,
    tuple(tiles),
    interpret=interpret,
  )


def unavailable() -> str | None:
  """Why this back end cannot run; None if it can."""
  try:
    _megablox()
  except ImportError as e:
    return f"jax has no megablox kernels ({e})"
  return None


def choose_tiles(
  m: int,
  k: int,
  n: int,
  num_groups: int,
  dtype,
  transposed_lhs=False,
) -> Tiles:
  """The tiles that a simple model of time finds best, within VMEM.

  A group that ends inside a tile makes the kernel visit that tile again, so
  tall tiles waste arithmetic (up to a tile per group), while small tiles in k
  and n read the operands again and again. Time is the greater of arithmetic and
  traffic, and a constant per step.

  Args:
    m: rows; k: contracted size; n: columns (for d_rhs: the result is `[k, n]`).
    num_groups: of the rows.
    dtype: of the operands.
    transposed_lhs: for d_rhs.
  """
  rows = [128, 256, 512] if m >= 128 else [_round_up(m, _SUBLANES)]
  model = _tgmm_seconds if transposed_lhs else _gmm_seconds
  size = jnp.dtype(dtype).itemsize
  best = None
  for tiles in itertools.starmap(
    Tiles, itertools.product(rows, _tile_sizes(k), _tile_sizes(n))
  ):
    if _vmem_bytes(tiles, size, transposed_lhs) <= _VMEM_BYTES:
      key = model(m, k, n, num_groups, size, tiles), -tiles.k, -tiles.n
      best = min(best or (key, tiles), (key, tiles))
  return best[1]


def _megablox():
  # By name: the package's attribute `gmm` is a function that hides the module.
  return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def _gmm(x, rhs_EDF, group_sizes_E, transposed, interpret):
  out = _product(x, rhs_EDF, group_sizes_E, transposed, interpret)
  return jnp.where(jnp.arange(len(x))[:, None] < group_sizes_E.sum(), out, 0)


def _product(x, rhs_EDF, group_sizes_E, transposed, interpret):
  """The kernel leaves rows that belong to no group unwritten."""
  dtype, (m, k) = x.dtype, x.shape
  n = rhs_EDF.shape[1 if transposed else 2]
  x, rhs_EDF = _one_type(x, rhs_EDF)
  tiles = choose_tiles(m, k, n, len(group_sizes_E), x.dtype)
  return _megablox().gmm(
    _pad(x, tiles.m),
    rhs_EDF,
    group_sizes_E,
    dtype,
    tuple(tiles),
    transpose_rhs=transposed,
    interpret=interpret,
  )[:m]


def _one_type(x, y):
  dtype = jnp.promote_types(x.dtype, y.dtype)
  return x.astype(dtype), y.astype(dtype)


def _pad(x, tile: int):
  """The kernel wants whole tiles of rows."""
  return jnp.pad(x, ((0, -len(x) % tile), (0, 0)))


def _round_up(x: int, to: int) -> int:
  return -(-x // to) * to


def _tile_sizes(size: int) -> list[int]:
  """All of it, or whole lanes; uneven ones only where nothing divides."""
  sizes = [size, *range(_LANES, min(size, 4097), _LANES)]
  even = [x for x in sizes if size % x == 0]
  return even if size % _LANES == 0 else sizes


def _vmem_bytes(tiles: Tiles, size: int, transposed_lhs: bool) -> int:
  """Inputs and output twice (one in flight), and a float32 accumulator."""
  mk, mn, kn = (tiles.m * tiles.k, tiles.m * tiles.n, tiles.k * tiles.n)
  if transposed_lhs:  # it also masks float32 copies of both inputs
    return (2 * size + 4) * (mk + mn) + (2 * size + 4) * kn
  return 2 * size * (mk + kn) + (2 * size + 4) * mn


def cost(
  m: int, k: int, n: int, num_groups: int, dtype, transposed_lhs=False
) -> tuple[float, float]:
  """Useful FLOPs, and HBM bytes with the tiles that a product gets.

  Args:
    as `choose_tiles`.
  """
  tiles = choose_tiles(m, k, n, num_groups, dtype, transposed_lhs)
  traffic = _tgmm_traffic if transposed_lhs else _gmm_traffic
  size = jnp.dtype(dtype).itemsize
  return 2.0 * m * k * n, float(size * traffic(m, k, n, num_groups, tiles))


def _gmm_seconds(m, k, n, num_groups, size, tiles: Tiles) -> float:
  traffic = size * _gmm_traffic(m, k, n, num_groups, tiles)
  return _seconds(math.prod(_grid(m, k, n, num_groups, tiles)), tiles, traffic)


def _tgmm_seconds(m, k, n, num_groups, size, tiles: Tiles) -> float:
  traffic = size * _tgmm_traffic(m, k, n, num_groups, tiles)
  return _seconds(math.prod(_grid(m, k, n, num_groups, tiles)), tiles, traffic)


def _gmm_traffic(m, k, n, num_groups, tiles: Tiles) -> int:
  visits, tiles_k, tiles_n = _grid(m, k, n, num_groups, tiles)
  # A weight tile stays in VMEM from visit to visit only if it has all of k.
  weights = k * n * (num_groups if tiles_k == 1 else visits)
  return visits * tiles.m * k * tiles_n + weights + m * n


def _tgmm_traffic(m, k, n, num_groups, tiles: Tiles) -> int:
  visits, tiles_k, tiles_n = _grid(m, k, n, num_groups, tiles)
  return visits * tiles.m * (k * tiles_n + n * tiles_k) + num_groups * k * n


def _grid(m, k, n, num_groups, tiles: Tiles) -> tuple[int, int, int]:
  visits = -(-m // tiles.m) + num_groups - 1
  return visits, -(-k // tiles.k), -(-n // tiles.n)


def _seconds(steps: int, tiles: Tiles, traffic: int) -> float:
  flops = 2 * steps * (tiles.m + _LOAD_ROWS) * tiles.k * tiles.n
  return max(flops / _FLOPS, traffic / _BYTES) + steps * _STEP_SECONDS
