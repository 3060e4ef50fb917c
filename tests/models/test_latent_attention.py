# SPDX-License-Identifier: Apache-2.0
"""Latent attention: by hand in float64, and the same from the cache."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MLAConfig, ModelConfig, MoEConfig
from moejax.errors import ConfigError
from moejax.models import KVCache, Rows, build, init_variables
from moejax.models.latent_attention import LatentAttention
from moejax.models.rope import (
  angle_factor,
  rope_angles,
  rope_frequencies,
  score_factor,
)
from moejax.models.rows import Context
from moejax.models.transformer import choose_backends
from moejax.spec import Spec
from tests.test_published import read

PUBLISHED = read("deepseek_v3").model.rope_scaling_spec
MLA = MLAConfig(q_rank=14, kv_rank=10, nope_dim=6, rope_dim=8, v_dim=18)
CONFIG = ModelConfig(
  vocab_size=53, d_model=24, num_layers=2, pattern=("mla/mlp",), num_heads=3,
  num_kv_heads=3, head_dim=14, d_mlp=20, mla=MLA, qk_norm="none",
  init_std=0.2, dtype="float32", moe=MoEConfig(num_experts=2, d_expert=4,
  router="top_k(k=1)"), rope_scaling="yarn(factor=4.0, original=16, "
  "beta_fast=2.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.0)",
)  # fmt: skip
T = 11


def rows_of(B, T, start=0):
  positions = jnp.tile(start + jnp.arange(T), (B, 1))
  return Rows(jnp.ones((B, T), jnp.int32), positions)


def test_published_yarn():
  """The numbers of the published config, from its formulas."""
  assert angle_factor(PUBLISHED) == 1.0
  scale = 192**-0.5 * score_factor(PUBLISHED)
  assert scale == pytest.approx(0.135234, abs=1e-6)
  got = rope_frequencies(64, 10000.0, PUBLISHED)
  plain = rope_frequencies(64, 10000.0, Spec("none", {}))
  np.testing.assert_allclose(got[:11], plain[:11], rtol=1e-6)  # up to pair 10
  np.testing.assert_allclose(got[23:], plain[23:] / 40, rtol=1e-6)
  middle = got[11:23] / plain[11:23]
  assert (np.diff(middle) < 0).all() and 1 / 40 < middle.min() < 0.2


def rotate(x, position):
  """Half-split RoPE of one vector under the config's yarn."""
  spec = CONFIG.rope_scaling_spec
  angle = position * np.float64(rope_frequencies(MLA.rope_dim, 1e4, spec))
  cos, sin = (angle_factor(spec) * f(angle) for f in (np.cos, np.sin))
  one, two = np.split(x, 2)
  return np.concatenate([one * cos - two * sin, two * cos + one * sin])


def norm(x, gain):
  return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def by_hand(p, x_TD):
  """The layer's formulas, a token and a head at a time."""
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), p)
  n, out = MLA.nope_dim, []
  c = norm(x_TD @ p["w_kv_down_DZ"], p["kv_norm"])
  q = norm(x_TD @ p["w_q_down_DZ"], p["q_norm"])
  k_rope = [rotate(x @ p["w_k_rope_DH"], t) for t, x in enumerate(x_TD)]
  size = (n + MLA.rope_dim) ** -0.5 * score_factor(CONFIG.rope_scaling_spec)
  for t in range(len(x_TD)):
    y = 0
    for head in range(CONFIG.num_heads):
      query = q[t] @ p["w_q_up_ZNH"][:, head]
      q_rope = rotate(query[n:], t)
      scores = np.array([
        query[:n] @ (c[s] @ p["w_k_up_ZNH"][:, head]) + q_rope @ k_rope[s]
        for s in range(t + 1)
      ])  # fmt: skip
      share = np.exp(size * scores - (size * scores).max())
      share /= share.sum()
      values = c[: t + 1] @ p["w_v_up_ZNH"][:, head]
      y += (share @ values) @ p["w_o_NHD"][head]
    out.append(y)
  return np.array(out)


@pytest.mark.parametrize("v_dim", [5, 18])
def test_a_layer_by_hand(v_dim):
  config = dataclasses.replace(
    CONFIG, mla=dataclasses.replace(MLA, v_dim=v_dim)
  )
  spec = config.rope_scaling_spec
  rows = rows_of(1, T)
  angles = rope_angles(
    rows.positions_BT, rope_frequencies(MLA.rope_dim, 1e4, spec),
    angle_factor(spec),
  )  # fmt: skip
  context = Context(rows, *angles, None)
  layer = LatentAttention(config, choose_backends(config, "cpu"))
  x_BTD = jax.random.normal(jax.random.key(0), (1, T, config.d_model))
  params = nn.unbox(layer.init(jax.random.key(1), x_BTD, context, None))
  for gain in ("q_norm", "kv_norm"):
    drawn = 1 + 0.3 * jax.random.normal(
      jax.random.key(2), params["params"][gain].shape
    )
    params["params"][gain] = drawn
  got, _, _ = layer.apply(params, x_BTD, context, None)
  want = by_hand(params["params"], np.asarray(x_BTD[0], np.float64))
  assert np.abs(got[0] - want).max() < 3e-6 * np.abs(want).max()


@pytest.mark.parametrize("q_rank", [0, 14])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_from_the_cache_it_is_the_same(scan_layers, q_rank):
  config = dataclasses.replace(
    CONFIG, scan_layers=scan_layers,
    mla=dataclasses.replace(MLA, q_rank=q_rank),
  )  # fmt: skip
  model = build(config)
  variables = init_variables(model, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, T), 0, 53)
  want = model.apply(variables, tokens, rows_of(2, T)).hidden_BTD
  cache = KVCache.empty(config, 2, 16)
  size = sum(x.size for x in jax.tree.leaves((cache.prefix, cache.pattern)))
  assert size == 2 * 16 * config.num_layers * (MLA.kv_rank + MLA.rope_dim)
  got = []
  for start, end in ((0, 4), (4, 5), (5, T)):  # several at once, too
    rows = rows_of(2, end - start, start)
    out = model.apply(variables, tokens[:, start:end], rows, cache)
    cache = out.cache
    got.append(out.hidden_BTD)
  np.testing.assert_allclose(
    jnp.concatenate(got, 1), want, rtol=2e-5, atol=2e-6
  )


def test_what_cannot_be_mixed_is_refused():
  for changes, message in (
    ({"pattern": ("mla/mlp", "attention/mlp")}, "all layers must be mla"),
    ({"qk_norm": "head"}, "mla layers have no QK-norm"),
    ({"clip_qkv": 1.0}, "mla layers have no QK-norm and no clip"),
  ):
    with pytest.raises(ConfigError, match=message):
      dataclasses.replace(CONFIG, **changes)
  with pytest.raises(ConfigError, match="rope_dim=7 is not even"):
    MLAConfig(rope_dim=7)
