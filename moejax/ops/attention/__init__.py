# SPDX-License-Identifier: Apache-2.0
"""Causal attention within segments: one function, four back ends.

A query sees the keys of its own segment whose position is not after its own.
Segment 0 is padding: it sees nothing, its output is zero and so are its
gradients. Attention over a cache (keys of earlier calls) is the same rule with
other keys. `plain` holds the scores of a row; `blockwise` is flash attention
in plain XLA, linear in memory; `cudnn` and `splash` are the kernels of GPU and
TPU.
"""

import warnings
from typing import Any

import jax

from moejax.ops.attention import kernels
from moejax.ops.attention.blockwise import blockwise
from moejax.ops.attention.plain import plain
from moejax.ops.attention.scores import Tokens

__all__ = ["BACKENDS", "attention", "choose_backend"]

Array = jax.Array

BACKENDS = ("plain", "blockwise", "cudnn", "splash")

# Row length from which `blockwise` is as fast as `plain` on a CPU, and the
# scores of `plain` no longer fit beside a model.
_LONG = 1024


def attention(
  q_BTNH: Array,
  k_BSKH: Array,
  v_BSKH: Array,
  *,
  query_segments_BT: Array,
  key_segments_BS: Array,
  query_positions_BT: Array,
  key_positions_BS: Array,
  backend: str,
  query_places_T: Array | None = None,
) -> Array:
  """Softmax attention of each query over the keys that it may see.

  For self-attention pass the very same arrays as segments and positions of
  queries and keys: positions then rise along each segment, so keys further
  along the row are never looked at. `cudnn` and `splash` need that, or
  `query_places_T`; attention over a cache takes `plain` or `blockwise` instead.

  Args:
    q_BTNH: queries; head n reads key/value head n // (N / K).
    k_BSKH: keys.
    v_BSKH: values.
    query_segments_BT: segment of each query; 0 is padding.
    key_segments_BS: segment of each key; 0 is padding or an empty cache slot.
    query_positions_BT: position of each query within its segment.
    key_positions_BS: position of each key within its segment.
    backend: one of BACKENDS; `choose_backend` knows which suits.
    query_places_T: of self-attention in which the queries are one of S / T
      parts of the row: where in it they lie.

  Returns:
    out_BTNH, of the dtype of the queries; zeros where there is nothing to see.
  """
  _check_name(backend, BACKENDS)
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  if N % K:
    raise ValueError(f"{N} query heads are not a multiple of {K} KV heads")
  queries = Tokens(query_segments_BT, query_positions_BT)
  keys = Tokens(key_segments_BS, key_positions_BS)
  same_row = all(a is b for a, b in zip(queries, keys))
  if backend in ("cudnn", "splash"):
    if same_row or query_places_T is not None:
      kernel = kernels.cudnn if backend == "cudnn" else kernels.splash
      return kernel(q_BTNH, k_BSKH, v_BSKH, queries, keys, query_places_T)
    backend = _xla_backend(k_BSKH.shape[1])
  function = plain if backend == "plain" else blockwise
  return function(q_BTNH, k_BSKH, v_BSKH, queries, keys, same_row)


def choose_backend(
  platform: str,
  requested: str,
  *,
  seq_len: int,
  head_dim: int,
  dtype: Any,
  query_len: int | None = None,
  parts: int = 1,
) -> tuple[str, str]:
  """The back end to use and, in words, why.

  Warns if that is not the one requested, or not the platform's fast one.

  Args:
    platform: cpu, gpu or tpu.
    requested: one of BACKENDS, or auto.
    seq_len: keys of a row, S.
    head_dim: size of a head, H.
    dtype: of the queries, keys and values.
    query_len: queries of a row, if not `seq_len`: attention over a cache.
    parts: of the queries of a row, each on another device.
  """
  _check_name(requested, ("auto", *BACKENDS))
  xla = _xla_backend(seq_len)
  if requested in ("plain", "blockwise"):
    return requested, "requested"
  if query_len is not None and query_len != seq_len:
    return xla, f"{query_len} queries over a cache of {seq_len}"
  kernel = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform)
  wanted = kernel if requested == "auto" else requested
  if wanted is None:
    return xla, f"{platform}, rows of {seq_len}"
  reason = None if wanted == kernel else f"{wanted} does not run on {platform}"
  sizes = seq_len // parts, seq_len, head_dim
  reason = reason or kernels.unsupported(wanted, *sizes, dtype)
  if reason is None:
    return wanted, f"{platform}; over a cache: plain or blockwise"
  warnings.warn(f"attention falls back to {xla}: {reason}", stacklevel=2)
  return xla, f"fallback: {reason}"


def _check_name(name: str, known: tuple[str, ...]) -> None:
  if name not in known:
    raise ValueError(
      f"no attention back end {name!r}; known: {', '.join(known)}"
    )


def _xla_backend(seq_len: int) -> str:
  return "plain" if seq_len < _LONG else "blockwise"
