# SPDX-License-Identifier: Apache-2.0
"""The TPU and GPU back ends as far as a CPU can try them.

The TPU kernels are interpreted and lowered, the GPU ones lowered; nothing here
has run on either.
"""

import contextlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops.grouped_matmul import (
  choose_backend,
  gpu,
  grouped_matmul,
  reference,
  tpu,
)

# Rows, D, F and group sizes: none is a multiple of a tile.
CASES = {
  "uneven": (300, 150, 70, [0, 129, 1, 0, 100, 40]),
  "all_empty": (20, 16, 8, [0, 0]),
  "tiny": (3, 8, 130, [1, 0, 2]),
}


def inputs(case, dtype=np.float32):
  rows, d, f, sizes = CASES[case]
  rng = np.random.default_rng(0)
  draw = lambda *shape: np.array(jnp.asarray(rng.standard_normal(shape), dtype))
  x, w, dy = draw(rows, d), draw(len(sizes), d, f), draw(rows, f)
  x[sum(sizes) :] = np.nan
  dy[sum(sizes) :] = np.nan
  return x, w, np.array(sizes, np.int32), dy


def assert_same(got, want, tolerance=1e-6):
  assert got.dtype == want.dtype
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.fixture(autouse=True)
def rank_promotion():
  """The kernels in jax itself rely on it."""
  with jax.numpy_rank_promotion("allow"):
    yield


@pytest.mark.parametrize(
  "case",
  [
    "tiny",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("uneven", "all_empty")),
  ],
)
def test_tpu_kernels_interpreted(case):
  x, w, sizes, dy = inputs(case)
  run = lambda kernel, *args: kernel(*args, interpret=True)
  assert_same(run(tpu.gmm, x, w, sizes), reference.gmm(x, w, sizes))
  assert_same(
    run(tpu.gmm_transposed, dy, w, sizes),
    reference.gmm_transposed(dy, w, sizes),
  )
  assert_same(
    run(tpu.tgmm, x, dy, sizes, jnp.float32),
    reference.tgmm(x, dy, sizes, jnp.float32),
  )


def test_tpu_kernels_interpreted_bfloat16():
  x, w, sizes, dy = inputs("uneven", jnp.bfloat16)
  assert_same(
    tpu.gmm(x, w, sizes, interpret=True), reference.gmm(x, w, sizes), 4e-3
  )
  assert_same(
    tpu.tgmm(x, dy, sizes, jnp.float32, interpret=True),
    reference.tgmm(x, dy, sizes, jnp.float32),
    1e-5,
  )


def test_tpu_kernels_with_several_tiles(monkeypatch):
  """Otherwise small sizes would always be one tile in k and n."""
  monkeypatch.setattr(
    tpu, "choose_tiles", lambda *_, **__: tpu.Tiles(128, 128, 128)
  )
  x, w, sizes, dy = inputs("uneven")
  w, dy = np.concatenate([w, w], 2), np.concatenate([dy, dy], 1)
  assert_same(tpu.gmm(x, w, sizes, interpret=True), reference.gmm(x, w, sizes))
  assert_same(
    tpu.gmm_transposed(dy, w, sizes, interpret=True),
    reference.gmm_transposed(dy, w, sizes),
  )
  assert_same(
    tpu.tgmm(x, dy, sizes, jnp.float32, interpret=True),
    reference.tgmm(x, dy, sizes, jnp.float32),
  )


@pytest.mark.parametrize(
  "sizes",
  [
    (32768, 2048, 1024, 64),
    (32768, 1024, 2048, 64),
    (4096, 1024, 2816, 8),
    (131072, 6144, 10752, 16),
    (8, 2048, 1024, 64),
    (1000, 100, 70, 3),
    (128, 129, 16384, 1),
    (500, 30000, 30001, 2),
  ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_fit_and_are_legal(sizes, dtype, transposed):
  _, k, n, _ = sizes
  tiles = tpu.choose_tiles(*sizes, dtype, transposed)
  itemsize = jnp.dtype(dtype).itemsize
  operands = tiles.m * (tiles.k + tiles.n) + tiles.k * tiles.n
  assert 2 * itemsize * operands < 16 * 2**20  # each is buffered twice
  assert tiles.m % 16 == 0
  for tile, size in (tiles.k, k), (tiles.n, n):
    assert tile == size or tile % 128 == 0


def test_tiles_follow_the_sizes():
  tall = tpu.choose_tiles(2**20, 6144, 10752, 4, "bfloat16")
  many = tpu.choose_tiles(32768, 2048, 1024, 64, "bfloat16")
  assert tall.m > many.m  # with small groups, a tall tile is mostly wasted
  assert min(many.k, many.n) >= 1024


def lower(platform, backend, dtype=jnp.bfloat16, rows=4096):
  shape = jax.ShapeDtypeStruct

  def loss(x, w, sizes):
    return (
      grouped_matmul(x, w, sizes, backend=backend).astype(jnp.float32).sum()
    )

  return (
    jax.jit(jax.value_and_grad(loss, (0, 1)))
    .trace(
      shape((rows, 256), dtype),
      shape((8, 256, 512), dtype),
      shape((8,), jnp.int32),
    )
    .lower(lowering_platforms=(platform,))
    .as_text()
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tpu_lowers_to_three_kernels(dtype):
  assert lower("tpu", "tpu", dtype).count("tpu_custom_call") >= 3


def test_gpu_lowers(monkeypatch):
  monkeypatch.setattr(gpu, "slow", lambda: "for this test")
  assert lower("cuda", "gpu")


def test_gpu_without_tokamax_is_right_and_says_so(monkeypatch):
  monkeypatch.setattr(gpu, "slow", lambda: "tokamax is missing")
  with pytest.warns(UserWarning, match="tokamax is missing"):
    name, reason = choose_backend("gpu")
  assert name == "gpu"
  assert "tokamax is missing" in reason
  x, w, sizes, dy = inputs("uneven")
  assert_same(jax.jit(gpu.gmm)(x, w, sizes), reference.gmm(x, w, sizes))
  assert_same(
    jax.jit(gpu.gmm_transposed)(dy, w, sizes),
    reference.gmm_transposed(dy, w, sizes),
  )
  assert_same(
    jax.jit(gpu.tgmm, static_argnums=3)(x, dy, sizes, jnp.float32),
    reference.tgmm(x, dy, sizes, jnp.float32),
  )


@pytest.mark.parametrize("supported", [True, False])
def test_gpu_with_tokamax(supported, monkeypatch):
  """It is asked for its own kernels, and a shape it refuses is a warning."""

  def ragged_dot_general(x, y, sizes, dims, preferred_element_type, **kwargs):
    assert kwargs == dict(implementation=("triton",))  # no GPU is here
    if not supported:
      errors = [NotImplementedError("no mosaic"), NotImplementedError("nor it")]
      raise ExceptionGroup("all implementations failed", errors)
    return jax.lax.ragged_dot_general(
      x, y, sizes, dims, preferred_element_type=preferred_element_type
    )

  # The real one is lowered and compiled in tests/plan/test_gpus.py.
  config = types.SimpleNamespace(cross_compile=contextlib.nullcontext)
  fake = types.SimpleNamespace(
    ragged_dot_general=ragged_dot_general, config=config
  )
  monkeypatch.setitem(sys.modules, "tokamax", fake)
  monkeypatch.setattr(gpu, "slow", lambda: None)
  x, w, sizes, _ = inputs("uneven")
  warned = pytest.warns(UserWarning, match="no mosaic; nor it")
  with contextlib.nullcontext() if supported else warned:
    out = gpu.gmm(x, w, sizes)
  assert_same(out, reference.gmm(x, w, sizes))


@pytest.mark.parametrize(
  "platform, requested",
  [("cpu", "tpu"), ("tpu", "cpu"), ("cpu", "gpu"), ("gpu", "tpu")],
)
def test_a_backend_of_another_platform_is_refused(platform, requested):
  with pytest.raises(ValueError, match=f"'{requested}' .* not {platform}"):
    choose_backend(platform, requested)


def test_tpu_is_chosen():
  assert choose_backend("tpu")[0] == "tpu"
