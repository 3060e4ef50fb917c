# SPDX-License-Identifier: Apache-2.0
"""Every back end that a CPU can run against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.grouped_matmul import (
  batched,
  choose_backend,
  cpu,
  cpu_ffi,
  describe,
  grouped_matmul,
)

BACKENDS = ("reference", "cpu", "cpu_loops")
# name: (rows, D, F, group sizes)
CASES = {
  "even": (32, 8, 16, [8, 8, 8, 8]),
  "zeros_and_ones": (30, 7, 5, [0, 1, 0, 13, 1, 15, 0]),
  "rows_beyond": (50, 9, 11, [3, 0, 10, 1]),
  "one_takes_all": (129, 33, 17, [0, 0, 129, 0]),
  "all_empty": (6, 4, 3, [0, 0, 0]),
  "one_row": (1, 3, 2, [0, 1]),
  "one_expert": (19, 6, 10, [19]),
  "single_values": (5, 1, 1, [2, 0, 3]),
  "decode": (8, 64, 48, [0] * 20 + [1, 0, 1, 2] + [0] * 37 + [1, 0, 3]),
  "weights_in_pieces": (7, 700, 600, [0, 1, 2, 0, 3]),
  "skewed": (700, 40, 24, [1, 333, 0, 5, 64, 65, 63, 31, 0, 100]),
  "many_parts": (3000, 160, 192, [0, 1700, 3, 0, 2, 900, 1, 300]),
}


def oracle(lhs_AD, rhs_EDF, sizes, d_out_AF):
  """Forward and both gradients, float64, a loop over the groups."""
  lhs, rhs, dy = (
    np.asarray(x, np.float64) for x in (lhs_AD, rhs_EDF, d_out_AF)
  )
  out, d_lhs = np.zeros(dy.shape), np.zeros(lhs.shape)
  d_rhs = np.zeros(rhs.shape)
  start = 0
  for e, size in enumerate(sizes):
    rows = slice(start, start + size)
    out[rows] = lhs[rows] @ rhs[e]
    d_lhs[rows] = dy[rows] @ rhs[e].T
    d_rhs[e] = lhs[rows].T @ dy[rows]
    start += size
  return out, d_lhs, d_rhs


def inputs(case, dtype=jnp.float32, seed=0):
  num_rows, d, f, sizes = CASES[case]
  rng = np.random.default_rng(seed)
  draw = lambda *shape: np.array(jnp.asarray(rng.standard_normal(shape), dtype))
  lhs_AD, rhs_EDF = draw(num_rows, d), draw(len(sizes), d, f)
  d_out_AF = draw(num_rows, f)
  lhs_AD[sum(sizes) :] = np.nan  # must not leak anywhere
  d_out_AF[sum(sizes) :] = np.nan
  return lhs_AD, rhs_EDF, np.array(sizes, np.int32), d_out_AF


def assert_close(got, want, tolerance):
  """Relative to the whole array, so that small numbers cannot hide an error."""
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape
  assert np.isfinite(got).all()
  error, scale = np.linalg.norm(got - want), np.linalg.norm(want)
  assert error <= tolerance * scale, f"relative error {error / scale:.1e}"


@functools.partial(jax.jit, static_argnums=4)
def value_and_gradients(lhs_AD, rhs_EDF, sizes_E, d_out_AF, backend):
  f = functools.partial(grouped_matmul, backend=backend)
  out_AF, vjp = jax.vjp(lambda x, w: f(x, w, sizes_E), lhs_AD, rhs_EDF)
  return out_AF, *vjp(d_out_AF)


# The loops take a second to compile, so they get the cases that differ there.
FEW = ("zeros_and_ones", "one_takes_all", "all_empty", "skewed")


@pytest.mark.parametrize(
  "case, dtype, backend",
  [
    (case, dtype, backend)
    for backend in BACKENDS
    for case in CASES
    for dtype in (jnp.float32, jnp.bfloat16)
    if (backend != "cpu_loops" or case in FEW)
    and (dtype == jnp.float32 or case in ("zeros_and_ones", "skewed"))
  ],
)
def test_values_and_gradients(case, dtype, backend):
  lhs_AD, rhs_EDF, sizes_E, d_out_AF = inputs(case, dtype)
  got = value_and_gradients(lhs_AD, rhs_EDF, sizes_E, d_out_AF, backend)
  want = oracle(lhs_AD, rhs_EDF, sizes_E, d_out_AF)
  tolerance = 1e-6 if dtype == jnp.float32 else 4e-3  # bf16: one rounding
  for x, y in zip(got, want):
    assert x.dtype == dtype
    assert_close(x, y, tolerance)
  used = sizes_E.sum()
  assert not np.asarray(got[0][used:]).any()
  assert not np.asarray(got[1][used:]).any()
  assert not np.asarray(got[2])[sizes_E == 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_types_keep_their_own(backend):
  lhs_AD, rhs_EDF, sizes_E, d_out_AF = inputs("rows_beyond")
  lhs_AD = jnp.asarray(lhs_AD, jnp.bfloat16)
  d_out_AF = jnp.asarray(d_out_AF, jnp.bfloat16)
  got = value_and_gradients(lhs_AD, rhs_EDF, sizes_E, d_out_AF, backend)
  assert [x.dtype for x in got] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  want = oracle(lhs_AD, rhs_EDF, sizes_E, d_out_AF)
  for x, y in zip(got, want):
    # Gradients of a float32 weight are not rounded to the rows' type.
    assert_close(x, y, 4e-3 if x.dtype == jnp.bfloat16 else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
  "shape", [(0, 4, 3, 2), (5, 0, 3, 2), (5, 4, 0, 2), (5, 4, 3, 0)]
)
def test_nothing_to_multiply(shape, backend):
  a, d, f, e = shape
  got = value_and_gradients(
    jnp.ones((a, d)),
    jnp.ones((e, d, f)),
    jnp.zeros(e, jnp.int32),
    jnp.ones((a, f)),
    backend,
  )
  assert [x.shape for x in got] == [(a, f), (a, d), (e, d, f)]
  assert not any(np.asarray(x).any() for x in got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_and_remat(backend):
  lhs_AD, _, sizes_E, _ = inputs("skewed")
  rng = np.random.default_rng(1)
  w_LEDD = rng.standard_normal((3, len(sizes_E), 40, 40), dtype=np.float32) / 6
  sizes_LE = np.stack([sizes_E, sizes_E[::-1], np.roll(sizes_E, 3)])
  lhs_AD[np.isnan(lhs_AD)] = 1

  def loss(x_AD, w_LEDD, multiply):
    @jax.checkpoint
    def layer(x_AD, w_and_sizes):
      return jnp.tanh(multiply(x_AD, *w_and_sizes)), None

    return (jax.lax.scan(layer, x_AD, (w_LEDD, sizes_LE))[0] ** 2).sum()

  def plain(x_AD, w_EDF, sizes_E):
    row_A = jnp.arange(x_AD.shape[0])
    expert_A = jnp.searchsorted(jnp.cumsum(sizes_E), row_A, side="right")
    one_hot_AE = jax.nn.one_hot(expert_A, len(sizes_E))  # 0 for rows beyond
    return jnp.einsum("AE,AD,EDF->AF", one_hot_AE, x_AD, w_EDF)

  run = lambda multiply: jax.jit(
    jax.value_and_grad(functools.partial(loss, multiply=multiply), (0, 1))
  )(lhs_AD, w_LEDD)
  got = run(functools.partial(grouped_matmul, backend=backend))
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(run(plain))):
    assert_close(x, np.asarray(y, np.float64), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_is_not_silently_wrong(backend):
  lhs_AD, rhs_EDF, sizes_E, d_out_AF = inputs("zeros_and_ones")
  sizes_BE = np.stack([sizes_E, sizes_E[::-1]])
  out_BAF = jax.vmap(
    lambda s: grouped_matmul(lhs_AD, rhs_EDF, s, backend=backend)
  )(sizes_BE)
  for sizes, out_AF in zip(sizes_BE, out_BAF):
    want = oracle(lhs_AD, rhs_EDF, sizes, d_out_AF)[0]
    assert_close(out_AF, want, 1e-6)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(lhs=jnp.ones((4, 2, 2))), "expected"),
    (dict(lhs=jnp.ones((4, 2))), "D=2 but rhs has D=3"),
    (dict(sizes=jnp.ones(5, jnp.int32)), "E=2 groups but there are 5 sizes"),
    (dict(sizes=jnp.ones(2)), "not integers"),
    (dict(lhs=jnp.ones((4, 3), jnp.int32)), "lhs is int32"),
    (dict(backend="cudnn"), "'cudnn'; known: auto, reference, cpu"),
  ],
)
def test_a_wrong_call_is_one_clear_line(change, message):
  call = (
    dict(
      lhs=jnp.ones((4, 3)),
      rhs=jnp.ones((2, 3, 5)),
      sizes=jnp.array([1, 2]),
      backend="cpu",
    )
    | change
  )
  with pytest.raises(ValueError) as e:
    grouped_matmul(
      call["lhs"], call["rhs"], call["sizes"], backend=call["backend"]
    )
  assert message in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "sizes, message",
  [
    ([3, 2], "group_sizes sum to 5, but there are only 4 rows"),
    ([3, -1], r"group_sizes\[1\] is -1; sizes cannot be negative"),
  ],
)
def test_cpu_refuses_impossible_sizes(sizes, message):
  f = jax.jit(functools.partial(grouped_matmul, backend="cpu"))
  args = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array(sizes, jnp.int32)
  # Its class depends on whether XLA ran the call in this thread.
  with pytest.raises((ValueError, RuntimeError), match=message):
    jax.block_until_ready(f(*args))
  # The next call is not affected.
  assert float(f(*args[:2], jnp.array([3, 1])).sum()) == 4 * 3 * 5


class FourThreads:
  """Stands in for XLA's pool: the jobs in an unhelpful order."""

  def num_threads(self):
    return 4

  def run(self, jobs, threads):
    assert threads == 4
    for job in reversed(jobs):
      job()


@pytest.mark.parametrize("case", CASES)
def test_cpu_kernels_write_every_element(case, monkeypatch):
  """XLA hands out memory as it comes; fresh memory is zero by luck."""
  monkeypatch.setattr(cpu, "_CORES", 4)
  monkeypatch.setattr(cpu, "_MIN_PART_SECONDS", 1e-7)  # many small parts
  lhs_AD, rhs_EDF, sizes_E, d_out_AF = inputs(case)
  want = oracle(lhs_AD, rhs_EDF, sizes_E, d_out_AF)
  got = [np.full(x.shape, np.nan, np.float32) for x in want]
  buffer = lambda x: cpu_ffi.Buffer(0, x.ctypes.data, x.shape)
  lhs, rhs, sizes, dy = map(buffer, (lhs_AD, rhs_EDF, sizes_E, d_out_AF))
  out, d_lhs, d_rhs = map(buffer, got)
  pool = FourThreads()
  cpu._gmm((lhs, rhs, sizes), (out,), pool, transposed=False)
  cpu._gmm((dy, rhs, sizes), (d_lhs,), pool, transposed=True)
  cpu._tgmm((lhs, dy, sizes), (d_rhs,), pool)
  for x, y in zip(got, want):
    assert_close(x, y, 1e-6)


@pytest.mark.parametrize("weight_size", [1, 1000, 10**6, 10**9])
@pytest.mark.parametrize("threads", [1, 2, 7, 128])
def test_parts_cover_every_row_once(threads, weight_size):
  rng = np.random.default_rng(0)
  for sizes in ([0, 0], [1], [2], [3, 0, 100_000], [0, 7, 7, 1, 500]):
    for _ in range(5):
      sizes_E = rng.permutation(sizes * 3).tolist()
      parts = cpu._split(sizes_E, weight_size, threads)
      start, seen = 0, [0] * len(sizes_E)
      for expert, first, last in (unit for part in parts for unit in part):
        assert first == start < last
        start, seen[expert] = last, seen[expert] + last - first
      assert seen == sizes_E
      assert len(parts) <= 10 * threads + len(sizes_E)


@pytest.mark.parametrize("requested", ["auto", "cpu", "reference"])
def test_choose_backend(requested):
  name, reason = choose_backend("cpu", requested)
  assert name == ("cpu" if requested == "auto" else requested)
  assert name in reason and "\n" not in reason


def test_choose_backend_unknown():
  with pytest.raises(ValueError, match="'magic'; known: auto, reference, cpu"):
    choose_backend("cpu", "magic")


def test_an_unknown_platform_falls_back_with_a_warning():
  with pytest.warns(
    UserWarning, match="no kernel for platform 'abacus'.*E times"
  ):
    name, _ = choose_backend("abacus")
  assert name == "reference"


def test_without_blas_falls_back_with_a_warning(monkeypatch):

  monkeypatch.setattr(cpu, "unavailable", lambda: "no scipy")
  with pytest.warns(UserWarning, match="'cpu_loops': no scipy; .*speed"):
    name, _ = choose_backend("cpu")
  assert name == "cpu_loops"
  with pytest.raises(ValueError, match="'cpu' cannot run: no scipy"):
    choose_backend("cpu", "cpu")
  with pytest.raises(RuntimeError, match="no scipy"):
    grouped_matmul(
      jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, int), backend="cpu"
    )


def test_describe_names_every_backend():
  lines = describe().splitlines()
  assert [line.split(":")[0] for line in lines] == [
    "reference",
    "cpu",
    "cpu_loops",
    "tpu",
    "gpu",
  ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", ["even", "one_expert"])
def test_groups_of_one_size_are_a_batched_product(case, dtype):
  """What a TPU or GPU computes where sizes are NumPy's and all the same."""
  lhs, rhs, sizes, d_out = inputs(case, dtype)
  out, d_lhs, d_rhs = oracle(lhs, rhs, sizes, d_out)
  given = [jnp.asarray(x, dtype) for x in (lhs, rhs, d_out)]
  tolerance = 1e-6 if dtype == jnp.float32 else 5e-3
  assert_close(batched.gmm(given[0], given[1], sizes), out, tolerance)
  got = batched.gmm_transposed(given[2], given[1], sizes)
  assert_close(got, d_lhs, tolerance)
  got = batched.tgmm(given[0], given[2], sizes, jnp.float32)
  assert_close(got, d_rhs, 1e-6)


def test_when_sizes_fit_a_batched_product():
  even = np.full(4, 8, np.int32)
  assert batched.fits("tpu", 32, even) and batched.fits("gpu", 32, even)
  assert not batched.fits("cpu", 32, even)  # BLAS is as fast
  assert not batched.fits("tpu", 33, even)  # rows beyond
  assert not batched.fits("tpu", 32, np.array([7, 9, 8, 8], np.int32))
  assert not batched.fits("tpu", 32, jnp.asarray(even))  # not known yet
