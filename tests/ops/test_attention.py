# SPDX-License-Identifier: Apache-2.0
"""Each attention back end against float64 NumPy, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.ops import attention as attention_ops
from moejax.ops.attention import attention, choose_backend, kernels

# Back ends that a CPU runs; splash in Pallas' interpreter.
ON_CPU = ("plain", "blockwise", "splash")
GRADIENTS = ("out", "d_q", "d_k", "d_v")


def oracle(q, k, v, d_out, q_tokens, k_tokens):
  """Attention and its gradients by the formula, one query at a time."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  (q_segments, q_positions), (k_segments, k_positions) = q_tokens, k_tokens
  out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
  (B, T, N, H), K = q.shape, k.shape[2]
  for b, t, n in np.ndindex(B, T, N):
    kv = n // (N // K)
    seen = (k_segments[b] == q_segments[b, t]) & (q_segments[b, t] != 0)
    seen &= k_positions[b] <= q_positions[b, t]
    if not seen.any():
      continue
    scores = k[b, seen, kv] @ q[b, t, n] / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    out[b, t, n] = weights @ v[b, seen, kv]
    d_weights = v[b, seen, kv] @ d_out[b, t, n]
    d_scores = weights * (d_weights - weights @ d_weights) / np.sqrt(H)
    d_q[b, t, n] = d_scores @ k[b, seen, kv]
    d_k[b, seen, kv] += np.outer(d_scores, q[b, t, n])
    d_v[b, seen, kv] += np.outer(weights, d_out[b, t, n])
  return out, d_q, d_k, d_v


def tokens_of(rows, T):
  """Segments and positions [B, T] of rows given as lists of lengths."""
  segments, positions = np.zeros((2, len(rows), T), np.int32)
  for b, lengths in enumerate(rows):
    start = 0
    for i, length in enumerate(lengths):
      segments[b, start : start + length] = i + 1
      positions[b, start : start + length] = np.arange(length)
      start += length
  return segments, positions


def inputs(shape, S=None, seed=0, dtype=jnp.float32):
  B, T, N, K, H = shape
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S or T, K, H), (B, S or T, K, H), (B, T, N, H)
  arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
  return *arrays[:3], arrays[3]


def value_and_gradients(backend, q, k, v, d_out, q_tokens, k_tokens=None):
  """[out, d_q, d_k, d_v]; self-attention if there are no `k_tokens`."""
  q_tokens = tuple(map(jnp.asarray, q_tokens))
  k_tokens = None if k_tokens is None else tuple(map(jnp.asarray, k_tokens))

  def call(q, k, v, q_tokens, k_tokens):
    keys = q_tokens if k_tokens is None else k_tokens
    return attention(
      q, k, v, query_segments_BT=q_tokens[0], key_segments_BS=keys[0],
      query_positions_BT=q_tokens[1], key_positions_BS=keys[1],
      backend=backend,
    )  # fmt: skip

  @jax.jit
  def run(q, k, v, d_out, q_tokens, k_tokens):
    out, vjp = jax.vjp(lambda *x: call(*x, q_tokens, k_tokens), q, k, v)
    return out, *vjp(d_out.astype(out.dtype))

  return run(q, k, v, d_out, q_tokens, k_tokens)


def assert_close(got, want, tolerance):
  for name, x, y in zip(GRADIENTS, got, want):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.isfinite(x).all(), name
    error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture
def interpreted_splash(monkeypatch):
  monkeypatch.setattr(
    kernels, "splash", functools.partial(kernels.splash, interpret=True)
  )


@pytest.mark.usefixtures("interpreted_splash")
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("heads", [(4, 4, 8), (4, 2, 64), (4, 1, 80)])
def test_packed_rows(backend, heads):
  T = 256
  q, k, v, d_out = inputs((2, T, *heads))
  tokens = tokens_of([[1, 130, 60, 2], [T]], T)
  got = value_and_gradients(backend, q, k, v, d_out, tokens)
  want = oracle(q, k, v, d_out, tokens, tokens)
  assert_close(got, want, 1e-5)


@pytest.mark.usefixtures("interpreted_splash")
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("T, parts", [(512, 2), (512, 4), (1280, 2)])
def test_parts_of_the_queries(backend, T, parts):
  """As devices have them that split rows; keys and values are whole."""
  q, k, v, d_out = inputs((2, T, 2, 1, 16))
  tokens = tokens_of([[90, 300, 100], [T]], T)
  keys = [jnp.asarray(x) for x in tokens]

  @jax.jit
  def part(q, k, v, d_out, queries, places):
    call = lambda q, k, v: attention(
      q, k, v, query_segments_BT=queries[0], key_segments_BS=keys[0],
      query_positions_BT=queries[1], key_positions_BS=keys[1],
      backend=backend, query_places_T=places,
    )  # fmt: skip
    out, vjp = jax.vjp(call, q, k, v)
    return out, *vjp(d_out)

  cut = lambda x, axis=1: np.split(np.asarray(x), parts, axis)
  found = [
    part(q, k, v, d_out, queries, places)
    for q, d_out, *queries, places in zip(
      cut(q), cut(d_out), *map(cut, tokens), cut(np.arange(T), 0)
    )
  ]
  out, d_q, d_k, d_v = zip(*found)
  whole = lambda xs: np.concatenate(xs, axis=1)
  got = whole(out), whole(d_q), sum(d_k), sum(d_v)
  assert_close(got, oracle(q, k, v, d_out, tokens, tokens), 1e-5)


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
@pytest.mark.parametrize("T", [2, 7, 128, 150, 300])
def test_row_lengths(backend, T):
  q, k, v, d_out = inputs((1, T, 2, 1, 8))
  tokens = tokens_of([[T]], T)
  got = value_and_gradients(backend, q, k, v, d_out, tokens)
  assert_close(got, oracle(q, k, v, d_out, tokens, tokens), 1e-5)


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
@pytest.mark.parametrize("T", [1, 40, 200])
def test_queries_over_a_cache(backend, T):
  S = 200
  q, k, v, d_out = inputs((2, T, 4, 2, 8), S=S)
  k_tokens = tokens_of([[190], [60]], S)  # the cache's last slots are empty
  q_tokens = (np.ones((2, T), np.int32), np.arange(T) + np.array([[150], [59]]))
  got = value_and_gradients(backend, q, k, v, d_out, q_tokens, k_tokens)
  assert_close(got, oracle(q, k, v, d_out, q_tokens, k_tokens), 1e-5)


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_no_key_is_missed_whatever_the_order(backend):
  """Skipping of blocks looks at ranges: unsorted rows must not fool it."""
  B, T, S = 2, 150, 300
  rng = np.random.default_rng(3)
  q, k, v, d_out = inputs((B, T, 2, 2, 8), S=S)
  q_tokens, k_tokens = (
    (rng.integers(0, 6, (B, n)), rng.integers(0, 50, (B, n))) for n in (T, S)
  )
  got = value_and_gradients(backend, q, k, v, d_out, q_tokens, k_tokens)
  assert_close(got, oracle(q, k, v, d_out, q_tokens, k_tokens), 1e-5)


@pytest.mark.usefixtures("interpreted_splash")
@pytest.mark.parametrize("backend", ON_CPU)
def test_padding_is_zero_and_inert(backend):
  T, real = 128, 100
  q, k, v, d_out = inputs((2, T, 2, 2, 8))
  tokens = tokens_of([[real], []], T)  # the second row is nothing but padding
  # Infinities in padding would show a product with a mask: 0 * inf is nan.
  d_out = d_out.at[0, real:].set(1e30)
  got = value_and_gradients(backend, q, k, v, d_out, tokens)
  for name, x in zip(GRADIENTS, got):
    assert np.isfinite(x).all(), name
    assert not np.asarray(x[0, real:]).any(), name
    assert not np.asarray(x[1]).any(), name


@pytest.mark.usefixtures("interpreted_splash")
@pytest.mark.parametrize("backend", ON_CPU)
def test_bfloat16(backend):
  T = 128
  q, k, v, d_out = inputs((2, T, 4, 2, 64), dtype=jnp.bfloat16)
  tokens = tokens_of([[50, 60], [T]], T)
  got = value_and_gradients(backend, q, k, v, d_out, tokens)
  assert all(x.dtype == jnp.bfloat16 for x in got)
  want = oracle(q, k, v, d_out, tokens, tokens)
  # Half of bfloat16's last place is 2**-9; a few roundings meet in gradients.
  assert_close(got, want, 2**-7)
  # The softmax itself is float32: the output is rounded about once.
  assert_close(got[:1], want[:1], 2**-8)


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_large_scores_do_not_overflow(backend):
  T = 64
  q, k, v, d_out = inputs((1, T, 2, 2, 8))
  tokens = tokens_of([[T]], T)
  got = value_and_gradients(backend, 1e3 * q, 1e3 * k, v, d_out, tokens)
  assert all(np.isfinite(x).all() for x in got)
  assert_close(
    got[:1], oracle(1e3 * q, 1e3 * k, v, d_out, tokens, tokens)[:1], 1e-3
  )


@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_causality(backend):
  """No output depends on a later token or on another segment."""
  T, at = 150, 70
  q, k, v, d_out = inputs((1, T, 2, 2, 8))
  tokens = tokens_of([[90, 60]], T)
  out = value_and_gradients(backend, q, k, v, d_out, tokens)[0]
  k, v = k.at[0, at].set(9.0), v.at[0, at].set(9.0)
  changed = value_and_gradients(backend, q, k, v, d_out, tokens)[0]
  differs_T = np.asarray(out != changed).any((0, 2, 3))
  assert differs_T[at:90].all()
  assert not differs_T[:at].any()
  assert not differs_T[90:].any()


def temporary_bytes(backend, T):
  """Memory of a forward and backward pass beside its inputs and results."""
  specs = [jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)] * 3
  tokens = [jax.ShapeDtypeStruct((1, T), jnp.int32)] * 2

  def loss(q, k, v, segments, positions):
    return attention(
      q, k, v, query_segments_BT=segments, key_segments_BS=segments,
      query_positions_BT=positions, key_positions_BS=positions,
      backend=backend,
    ).sum()  # fmt: skip

  step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  stats = step.lower(*specs, *tokens).compile().memory_analysis()
  return stats.temp_size_in_bytes


def test_blockwise_memory_is_linear():
  assert temporary_bytes("blockwise", 2048) < 2.2 * temporary_bytes(
    "blockwise", 1024
  )
  # The test can fail: `plain` grows with the square.
  assert temporary_bytes("plain", 2048) > 3 * temporary_bytes("plain", 1024)


def test_blockwise_skips_what_cannot_be_seen():
  from moejax.ops.attention.blockwise import _needed, _split
  from moejax.ops.attention.scores import Tokens

  T, block = 512, 128
  rows = Tokens(*(_split(jnp.asarray(x), block) for x in tokens_of([[T]], T)))
  assert int(_needed(rows, rows, True).sum()) == 10  # of 16, the triangle
  rows = tokens_of([[256, 128]], T)
  rows = Tokens(*(_split(jnp.asarray(x), block) for x in rows))
  needed = np.asarray(_needed(rows, rows, True)).astype(int)
  assert needed.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0] * 4]


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
@pytest.mark.parametrize("parts", [1, 2])
def test_kernels_lower_for_their_platform(backend, parts, monkeypatch):
  """Traces to the kernel, forward and backward, without the hardware."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )
  q, k, v, _ = inputs((2, 256, 4, 2, 128), dtype=jnp.bfloat16)
  segments, positions = map(jnp.asarray, tokens_of([[200], [100, 156]], 256))
  T = 256 // parts
  places = None if parts == 1 else jnp.arange(T, 2 * T)

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def step(q, k, v, segments, positions):
    out = attention(
      q[:, -T:], k, v, key_segments_BS=segments, key_positions_BS=positions,
      query_segments_BT=segments if parts == 1 else segments[:, T:],
      query_positions_BT=positions if parts == 1 else positions[:, T:],
      backend=backend, query_places_T=places,
    )  # fmt: skip
    return out.astype(jnp.float32).sum()

  platform = {"cudnn": "cuda", "splash": "tpu"}[backend]
  kernel = {"cudnn": "__cudnn$fmha", "splash": "tpu_custom_call"}[backend]
  lowered = step.trace(q, k, v, segments, positions).lower(
    lowering_platforms=(platform,)
  )
  text = lowered.as_text()
  assert text.count(kernel) >= 2
  assert "exponential" not in text  # nothing is left to plain XLA


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_kernels_leave_the_cache_to_xla(backend):
  q, k, v, d_out = inputs((1, 1, 2, 2, 8), S=20)
  k_tokens = tokens_of([[12]], 20)
  q_tokens = np.ones((1, 1), np.int32), np.full((1, 1), 11)
  got = value_and_gradients(backend, q, k, v, d_out, q_tokens, k_tokens)
  assert_close(got, oracle(q, k, v, d_out, q_tokens, k_tokens), 1e-5)


def test_unknown_names_list_the_known():
  with pytest.raises(ValueError, match="plain, blockwise, cudnn, splash"):
    choose_backend("cpu", "flash", seq_len=8, head_dim=8, dtype=jnp.float32)
  q, k, v, d_out = inputs((1, 4, 2, 2, 8))
  with pytest.raises(ValueError, match="'auto'; known: plain, blockwise"):
    value_and_gradients("auto", q, k, v, d_out, tokens_of([[4]], 4))


def test_heads_must_divide():
  q, k, v, d_out = inputs((1, 4, 3, 2, 8))
  with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
    value_and_gradients("plain", q, k, v, d_out, tokens_of([[4]], 4))


@pytest.mark.hf
@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_against_torch(backend):
  torch = pytest.importorskip("torch")
  T = 200
  q, k, v, d_out = inputs((2, T, 4, 2, 16))
  want = [
    torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_()
    for x in (q, k, v)
  ]
  out = torch.nn.functional.scaled_dot_product_attention(
    *want, is_causal=True, enable_gqa=True
  )
  out.backward(torch.tensor(np.asarray(d_out)).transpose(1, 2))
  want = [out.detach(), *(x.grad for x in want)]
  want = [x.transpose(1, 2).numpy() for x in want]
  tokens = tokens_of([[T], [T]], T)
  got = value_and_gradients(backend, q, k, v, d_out, tokens)
  assert_close(got, want, 1e-5)


def test_back_ends_are_those_of_the_config():
  from moejax.config import ModelConfig
  from moejax.errors import ConfigError

  for name in (*attention_ops.BACKENDS, "auto"):
    assert ModelConfig(attention=name).attention == name
  with pytest.raises(ConfigError):
    ModelConfig(attention="flash")
