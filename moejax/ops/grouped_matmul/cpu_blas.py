# SPDX-License-Identifier: Apache-2.0
"""scipy's single-precision BLAS, called by address and without the GIL.

scipy (a dependency of jax) publishes its BLAS routines as C pointers for
Cython; ctypes can call them as well. (Not `cblas_sgemm_batch`, one call for all
products: in the OpenBLAS 0.3.30 of scipy's wheels it crashes when
m * n * k <= 100**3; https://github.com/OpenMathLib/OpenBLAS/pull/5980.)
"""

import ctypes as c
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# sgemm copies the whole weight, so up to this many rows a matrix-vector product
# per row moves less memory (Zen 3, OpenBLAS 0.3.30: equal at 6 rows).
_MAX_VECTOR_ROWS = 4
_PIECE = 1 << 17  # floats of an operand that a core's own cache holds
_INT = c.sizeof(c.c_int)
_FLOAT = c.sizeof(c.c_float)
# Fortran takes everything by address; these stay where they are.
_CONSTANTS = (
  c.c_char(b"N"),
  c.c_char(b"T"),
  c.c_float(1),
  c.c_float(0),
  c.c_int(1),
)
_NO, _YES, _ONE, _ZERO, _STEP = map(c.addressof, _CONSTANTS)


class Blas(NamedTuple):
  """The routines, and whether they keep to the calling thread."""

  sgemm: object
  sgemv: object
  sdot: object
  threads_off: bool


class Layout(NamedTuple):
  """`C = op(A) @ op(B)`, row-major; the strides are the lengths of the rows."""

  transpose_a: bool
  transpose_b: bool
  stride_a: int
  stride_b: int
  stride_c: int


class Product(NamedTuple):
  """`[m, k] x [k, n]` at three addresses."""

  m: int
  n: int
  k: int
  a: int
  b: int
  c: int


def multiply(blas: Blas, layout: Layout, products: Sequence[Product]) -> None:
  """Does the products one after the other, in this thread."""
  ints = list(layout[2:])
  for p in products:
    ints += p[:3]
  memory = (c.c_int * len(ints))(*ints)
  stride_a, stride_b, stride_c = (
    c.addressof(memory) + _INT * i for i in range(3)
  )
  m = stride_c + _INT
  a_is, b_is = (_YES if t else _NO for t in layout[:2])
  for p in products:
    if p.m <= _MAX_VECTOR_ROWS and not layout.transpose_a:
      _multiply_rows(blas, layout, p)
    else:
      _read_ahead(blas, layout, p)
      # Fortran reads row-major memory as the transpose: C' = op(B)' op(A)'.
      blas.sgemm(
        b_is,
        a_is,
        m + _INT,
        m,
        m + 2 * _INT,
        _ONE,
        p.b,
        stride_b,
        p.a,
        stride_a,
        _ZERO,
        p.c,
        stride_c,
      )
    m += 3 * _INT


def _read_ahead(blas: Blas, layout: Layout, p: Product) -> None:
  """Brings small operands into the cache by dot products with themselves.

  sgemm and sgemv draw them from memory, in strides, at half the rate of a
  plain pass or less. On one Zen 4 core [256, 512] x [512, 256] takes 796 us
  cold, 679 us warm, and the pass 30; one row takes 76 us, 39 with the pass.
  """
  a = (p.k, p.m) if layout.transpose_a else (p.m, p.k)
  b = (p.n, p.k) if layout.transpose_b else (p.k, p.n)
  for address, (rows, length), stride in (
    (p.a, a, layout.stride_a), (p.b, b, layout.stride_b)
  ):  # fmt: skip
    if length == stride and rows * length <= _PIECE:
      _read(blas, address, rows * length)


def _read(blas: Blas, address: int, size: int) -> None:
  count = c.c_int(size)
  blas.sdot(c.addressof(count), address, _STEP, address, _STEP)


def _multiply_rows(blas: Blas, layout: Layout, p: Product) -> None:
  """A matrix-vector product for each row of A, B a piece at a time."""
  rows, length = (p.n, p.k) if layout.transpose_b else (p.k, p.n)
  step = max(1, _PIECE // length)
  for start in range(0, rows, step):
    count = min(step, rows - start)
    ints = (c.c_int * 3)(length, count, layout.stride_b)
    m, n, stride = (c.addressof(ints) + _INT * i for i in range(3))
    b = p.b + _FLOAT * start * layout.stride_b
    _read(blas, b, length * count)
    if layout.transpose_b:
      in_, out, add = p.a, p.c + _FLOAT * start, _ZERO
    else:
      in_, out, add = p.a + _FLOAT * start, p.c, _ONE if start else _ZERO
    for i in range(p.m):
      x = in_ + _FLOAT * i * layout.stride_a
      y = out + _FLOAT * i * layout.stride_c
      b_is = _YES if layout.transpose_b else _NO
      blas.sgemv(b_is, m, n, _ONE, b, stride, x, _STEP, add, y, _STEP)


@functools.cache
def load() -> Blas:
  """Finds the routines and tries each one; raises if one is missing or wrong.

  OpenBLAS's own threads are switched off, in this process, for scipy (numpy
  has a library of its own): after each call they spin for some 30 ms, on cores
  that XLA could use. The work is spread over XLA's threads instead.
  """
  set_num_threads = _symbol(
    c.CFUNCTYPE(None, c.c_int),
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads",
  )
  if set_num_threads is not None:
    set_num_threads(1)
  blas = Blas(
    _capsule("sgemm", 13),
    _capsule("sgemv", 11),
    _capsule("sdot", 5),
    threads_off=set_num_threads is not None,
  )
  _try_out(blas)
  return blas


def _capsule(name: str, num_args: int):
  import scipy.linalg.cython_blas as cython_blas  # only if this back end runs

  get_name = c.PYFUNCTYPE(c.c_char_p, c.py_object)(
    ("PyCapsule_GetName", c.pythonapi)
  )
  get_pointer = c.PYFUNCTYPE(c.c_void_p, c.py_object, c.c_char_p)(
    ("PyCapsule_GetPointer", c.pythonapi)
  )
  capsule = cython_blas.__pyx_capi__[name]
  address = get_pointer(capsule, get_name(capsule))
  # CFUNCTYPE: the GIL is released for the length of the call.
  return c.CFUNCTYPE(None, *[c.c_void_p] * num_args)(address)


def _symbol(prototype, *names: str):
  import scipy.linalg.cython_blas as cython_blas

  library = c.CDLL(cython_blas.__file__)  # finds what it is linked with, too
  for name in names:
    try:
      return prototype((name, library))
    except AttributeError:
      continue
  return None


def _try_out(blas: Blas) -> None:
  """Another calling convention (64-bit integers, say) must not go unnoticed."""
  a = np.arange(35, dtype=np.float32).reshape(7, 5) - 17
  b = np.arange(15, dtype=np.float32).reshape(5, 3) - 7
  for m in (1, 7):
    for transpose_b in (False, True):
      stored_b = np.ascontiguousarray(b.T) if transpose_b else b
      out = np.full((m, 3), np.nan, np.float32)
      layout = Layout(False, transpose_b, 5, stored_b.shape[1], 3)
      multiply(
        blas,
        layout,
        [
          Product(m, 3, 5, a.ctypes.data, stored_b.ctypes.data, out.ctypes.data)
        ],
      )
      if not np.array_equal(out, a[:m] @ b):
        raise RuntimeError("scipy's BLAS does not multiply as expected")
