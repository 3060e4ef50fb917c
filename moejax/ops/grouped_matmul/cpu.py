# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on a CPU: one BLAS product per group; no copies, no padding.

Three custom calls, whose handlers are Python functions that hand addresses to
scipy's BLAS (`cpu_blas`) on XLA's threads (`cpu_ffi`). float32 inside; other
types are converted around the call.
"""

import atexit
import ctypes
import functools
import os

import jax
import jax.numpy as jnp

from moejax.ops.grouped_matmul import cpu_blas, cpu_ffi

_PARTS_PER_THREAD = 4  # parts are taken as threads come free
_MIN_PART_SECONDS = 2e-4  # less is not worth waking a thread for
_MIN_ROWS = 8  # of a cut group: fewer, and reading its weight costs more
# Of one core, roughly: they weigh many rows of a group against many groups.
_FLOPS, _BYTES = 5e10, 1.5e10
_FLOAT = 4
_CORES = os.cpu_count() or 1


def gmm(lhs_AD, rhs_EDF, group_sizes_E):
  """`lhs_AD @ rhs_EDF[group]` -> `[A, F]`; zeros beyond the last group."""
  shape = lhs_AD.shape[0], rhs_EDF.shape[2]
  return _call(
    "moejax_gmm", shape, lhs_AD, rhs_EDF, group_sizes_E, lhs_AD.dtype
  )


def gmm_transposed(d_out_AF, rhs_EDF, group_sizes_E):
  """`d_out_AF @ rhs_EDF[group].T` -> `[A, D]`; zeros beyond the last group."""
  shape = d_out_AF.shape[0], rhs_EDF.shape[1]
  return _call(
    "moejax_gmm_transposed",
    shape,
    d_out_AF,
    rhs_EDF,
    group_sizes_E,
    d_out_AF.dtype,
  )


def tgmm(lhs_AD, d_out_AF, group_sizes_E, dtype):
  """`lhs_AD[group].T @ d_out_AF[group]` -> `[E, D, F]`; zeros if empty."""
  shape = group_sizes_E.shape[0], lhs_AD.shape[1], d_out_AF.shape[1]
  return _call("moejax_tgmm", shape, lhs_AD, d_out_AF, group_sizes_E, dtype)


@functools.cache
def unavailable() -> str | None:
  """Why this back end cannot run here; None if it can."""
  try:
    cpu_blas.load()
    for name, function in _HANDLERS.items():
      jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(function), platform="cpu"
      )
    atexit.register(_finish_programs, os.getpid())
  except Exception as e:  # pylint: disable=broad-except
    return f"scipy's BLAS cannot be called ({type(e).__name__}: {e})"
  return None


def _finish_programs(pid: int) -> None:
  """Waits for programs that were started and never waited for.

  Their calls need the interpreter: once it shuts down they could neither run
  nor return, and the process would hang instead of exiting.
  """
  if os.getpid() != pid:
    return  # a forked child has none of XLA's threads
  jax.block_until_ready(jax.live_arrays("cpu"))
  for device in jax.local_devices(backend="cpu"):
    # Runs after what this thread has started, also if its results are gone.
    jax.block_until_ready(jax.device_put(1.0, device) + 1.0)


def _call(name, shape, x, y, group_sizes_E, dtype):
  if reason := unavailable():
    raise RuntimeError(f"grouped_matmul backend 'cpu': {reason}")
  call = jax.ffi.ffi_call(
    name, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
  )
  out = call(x.astype(jnp.float32), y.astype(jnp.float32), group_sizes_E)
  return out.astype(dtype)


def _gmm(args, rets, pool, transposed):
  """x `[A, k]`, weights `[E, D, F]`, sizes `[E]` -> `[A, n]`."""
  (x, weights, sizes), (out,) = args, rets
  _, d, f = weights.shape
  k, n = (f, d) if transposed else (d, f)
  sizes_E = _read_sizes(sizes, x.shape[0])
  _zero(out.data, n * sum(sizes_E), n * x.shape[0])
  threads = _num_threads(pool)
  layout = cpu_blas.Layout(False, transposed, k, f, n)
  _run(
    layout,
    pool,
    threads,
    [
      [
        cpu_blas.Product(
          stop - start,
          n,
          k,
          x.data + _FLOAT * k * start,
          weights.data + _FLOAT * d * f * expert,
          out.data + _FLOAT * n * start,
        )
        for expert, start, stop in part
      ]
      for part in _split(sizes_E, d * f, threads)
    ],
  )


def _tgmm(args, rets, pool):
  """x `[A, D]`, dy `[A, F]`, sizes `[E]` -> `[E, D, F]`."""
  (x, dy, sizes), (out,) = args, rets
  _, d, f = out.shape
  sizes_E = _read_sizes(sizes, x.shape[0])
  first_E = [0]
  for expert, size in enumerate(sizes_E):
    first_E.append(first_E[-1] + size)
    if not size:
      _zero(out.data, d * f * expert, d * f * (expert + 1))
  threads = _num_threads(pool)
  layout = cpu_blas.Layout(True, False, d, f, f)
  jobs = []
  for part in _split(sizes_E, d * f, threads):
    products = []
    for expert, start, stop in part:
      # A group is shared out by rows of the result, not of the inputs: a cut at
      # a fraction of the group's rows is a cut at that fraction of D.
      first, rows = first_E[expert], sizes_E[expert]
      d0, d1 = ((row - first) * d // rows for row in (start, stop))
      if d0 < d1:
        products.append(
          cpu_blas.Product(
            d1 - d0,
            f,
            rows,
            x.data + _FLOAT * (d * first + d0),
            dy.data + _FLOAT * f * first,
            out.data + _FLOAT * f * (d * expert + d0),
          )
        )
    jobs.append(products)
  _run(layout, pool, threads, jobs)


def _read_sizes(sizes: cpu_ffi.Buffer, num_rows: int) -> list[int]:
  memory = (ctypes.c_int32 * sizes.shape[0]).from_address(sizes.data)
  sizes_E = memory[:]
  if min(sizes_E) < 0:
    raise ValueError(
      f"grouped_matmul: group_sizes[{sizes_E.index(min(sizes_E))}] is "
      f"{min(sizes_E)}; sizes cannot be negative"
    )
  if sum(sizes_E) > num_rows:
    raise ValueError(
      f"grouped_matmul: group_sizes sum to {sum(sizes_E)}, but "
      f"there are only {num_rows} rows"
    )
  return sizes_E


def _zero(address: int, start: int, stop: int) -> None:
  if stop > start:
    ctypes.memset(address + _FLOAT * start, 0, _FLOAT * (stop - start))


def _split(sizes_E, weight_size: int, threads: int):
  """Shares the rows out into parts of about equal cost.

  Returns parts, each a list of `(expert, start, stop)`: rows of one expert.
  """
  row_cost = 2 * weight_size / _FLOPS
  group_cost = _FLOAT * weight_size / _BYTES
  groups = [(e, size) for e, size in enumerate(sizes_E) if size]
  total = sum(size * row_cost + group_cost for _, size in groups)
  count = int(total / _MIN_PART_SECONDS) if threads > 1 else 1
  budget = total / max(1, min(count, threads * _PARTS_PER_THREAD))
  parts, room, start = [[]], budget, 0
  for expert, size in groups:
    stop = start + size
    while start < stop:
      cost = (stop - start) * row_cost + group_cost
      rows = stop - start
      if cost > room + _MIN_PART_SECONDS:
        fitting = int((room - group_cost) / row_cost)
        if fitting < _MIN_ROWS:
          fitting = 0 if parts[-1] else _MIN_ROWS
        rows = min(rows, fitting)
      if rows:
        parts[-1].append((expert, start, start + rows))
        start += rows
        room -= rows * row_cost + group_cost
      if start < stop or room <= 0:
        parts.append([])
        room = budget
  return parts


def _num_threads(pool) -> int:
  if not cpu_blas.load().threads_off:
    return 1  # the library spreads each product itself
  return min(pool.num_threads(), _CORES)


def _run(layout, pool, threads, parts) -> None:
  blas = cpu_blas.load()
  jobs = [
    functools.partial(cpu_blas.multiply, blas, layout, products)
    for products in parts
    if products
  ]
  if len(jobs) > 1:
    pool.run(jobs, threads)
  elif jobs:
    jobs[0]()


# Kept alive here for as long as XLA may call them: until the process ends.
_HANDLERS = {
  "moejax_gmm": cpu_ffi.handler(functools.partial(_gmm, transposed=False)),
  "moejax_gmm_transposed": cpu_ffi.handler(
    functools.partial(_gmm, transposed=True)
  ),
  "moejax_tgmm": cpu_ffi.handler(_tgmm),
}
