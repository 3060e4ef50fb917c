# SPDX-License-Identifier: Apache-2.0
"""Hunyuan-Large, which transformers does not have, against plain numpy.

Written from the formulas of the published model: raw keys and values of every
even layer are read by the odd layer after it, which rotates and norms them with
a gain of its own; one shared expert and one routed, top-1 and not renormalised.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.convert.hunyuan import hunyuan
from moejax.errors import ConfigError
from moejax.generate import generate_tokens
from moejax.models import KVCache, Rows, build, init_variables
from moejax.sampling import Sampling

L, D, N, K, H, E, F, V = 4, 24, 6, 2, 10, 5, 14, 37
ALPHA, EPS = 1e3, 1e-5
B, T = 2, 13
CONFIG = ModelConfig(
  vocab_size=V, d_model=D, num_layers=L, num_heads=N, num_kv_heads=K,
  head_dim=H, dtype="float32", pattern=("attention/moe", "shared_kv/moe"),
  qk_norm="head_after_rope", norm_eps=EPS, tie_embeddings=True,
  rope_scaling=f"ntk(alpha={ALPHA})", scan_layers=False,
  moe=MoEConfig(
    num_experts=E, d_expert=F, router="top_k(k=1)", num_shared_experts=1
  ),
)  # fmt: skip


def hub_tensors():
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(len(shape) == 1, 0.2, shape).astype(np.float32)
    for rule in hunyuan(CONFIG)
    for name, shape in zip(rule.names, rule.shapes)
  }


def to_tree(tensors):
  tree = {}
  for rule in hunyuan(CONFIG):
    for path, leaf in zip(
      rule.paths, rule.load([tensors[n] for n in rule.names])
    ):
      node = tree
      for key in path[:-1]:
        node = node.setdefault(key, {})
      node[path[-1]] = jnp.asarray(leaf)
  return tree


def rms(x, gain):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gain


def rope(x_THd):
  theta = 1e4 * ALPHA ** (H / (H - 2))
  angle = np.arange(len(x_THd))[:, None] * theta ** (-np.arange(0, H, 2) / H)
  cos, sin = (
    np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin)
  )
  half = np.concatenate([-x_THd[..., H // 2 :], x_THd[..., : H // 2]], -1)
  return x_THd * cos + half * sin


def silu(x):
  return x / (1 + np.exp(-x))


def swiglu(t, prefix, x):
  gate, up, down = (
    t[f"{prefix}.{which}_proj.weight"] for which in ("gate", "up", "down")
  )
  return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def logits_of_row(t, tokens_T):
  """[T, V], one loop over layers, heads and tokens' experts."""
  x = t["model.embed_tokens.weight"][tokens_T]
  for layer in range(L):
    p = f"model.layers.{layer}"
    a = f"{p}.self_attn"
    h = rms(x, t[f"{p}.input_layernorm.weight"])
    q = (h @ t[f"{a}.q_proj.weight"].T).reshape(-1, N, H)
    if layer % 2 == 0:
      raw = [(h @ t[f"{a}.{w}_proj.weight"].T).reshape(-1, K, H) for w in "kv"]
    q = rms(rope(q), t[f"{a}.query_layernorm.weight"])
    k = rms(rope(raw[0]), t[f"{a}.key_layernorm.weight"])
    out = np.zeros_like(q)
    for n in range(N):
      scores = q[:, n] @ k[:, n // (N // K)].T / np.sqrt(H)
      scores = np.where(np.tri(len(x)), scores, -np.inf)
      weight = np.exp(scores - scores.max(-1, keepdims=True))
      weight /= weight.sum(-1, keepdims=True)
      out[:, n] = weight @ raw[1][:, n // (N // K)]
    x = x + out.reshape(len(x), -1) @ t[f"{a}.o_proj.weight"].T
    h = rms(x, t[f"{p}.post_attention_layernorm.weight"])
    scores = h @ t[f"{p}.mlp.gate.wg.weight"].T
    prob = np.exp(scores - scores.max(-1, keepdims=True))
    prob /= prob.sum(-1, keepdims=True)
    y = swiglu(t, f"{p}.mlp.shared_mlp", h)
    for i, e in enumerate(prob.argmax(-1)):
      y[i] += prob[i, e] * swiglu(t, f"{p}.mlp.experts.{e}", h[i])
    x = x + y
  return rms(x, t["model.norm.weight"]) @ t["model.embed_tokens.weight"].T


@pytest.fixture(scope="module")
def tokens_BT():
  return np.random.default_rng(1).integers(0, V, (B, T))


@pytest.fixture(scope="module")
def tensors():
  return hub_tensors()


def test_logits_against_numpy(tensors, tokens_BT):
  exact = {name: x.astype(np.float64) for name, x in tensors.items()}
  want = np.stack([logits_of_row(exact, row) for row in tokens_BT])
  model, variables = build(CONFIG), to_tree(tensors)
  rows = Rows(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))

  @jax.jit
  def logits(variables):
    out = model.apply(variables, jnp.asarray(tokens_BT), rows)
    return model.apply(variables, out.hidden_BTD, method="logits")

  got = np.asarray(logits(variables), np.float64)
  assert np.abs(got - want).max() / np.abs(want).max() < 3e-6


def test_greedy_tokens_with_half_the_cache(tensors, tokens_BT):
  exact = {name: x.astype(np.float64) for name, x in tensors.items()}
  got = generate_tokens(
    build(CONFIG), to_tree(tensors), tokens_BT[:1].tolist(), 6,
    Sampling(temperature=0), jax.random.key(0),
  )[0]  # fmt: skip
  row = tokens_BT[0]
  for token in got:
    want = logits_of_row(exact, row)[-1].argmax()
    assert token == want
    row = np.append(row, want)
  cache = KVCache.empty(CONFIG, 1, 8)
  size = sum(x.size for x in jax.tree.leaves(cache.pattern))
  assert size == L // 2 * 2 * 8 * K * H  # keys and values of 2 of 4 layers


def test_gains_of_the_shared_keys_are_each_layers_own():
  variables = init_variables(build(CONFIG), jax.random.key(0))
  for r in range(L // 2):
    for block in ("block_0", "block_1"):
      attention = variables["params"][f"repeats_{r}"][block]["attention"]
      assert attention["k_norm"].shape == (H,)
      assert ("w_k_DKH" in attention) == (block == "block_0")


@pytest.mark.parametrize(
  "options, message",
  [
    ({"pattern": ("shared_kv/moe",)}, "needs a layer with keys before it"),
    ({"qk_norm": "full"}, "norms keys before RoPE"),
    ({"rope_scaling": "ntk(factor=2)"}, "ntk takes alpha"),
    ({"rope_scaling": "nkt(alpha=2)"}, "did you mean 'ntk'"),
    ({"pattern": ("moa/moe",), "qk_norm": "none"}, "attention experts"),
  ],
)
def test_what_cannot_be_is_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(CONFIG, **options)
