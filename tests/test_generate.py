# SPDX-License-Identifier: Apache-2.0
"""Generation against sampling from full forward passes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.data.tokenizer import load_tokenizer
from moejax.errors import ConfigError
from moejax.generate import generate, generate_tokens, prompt_tokens
from moejax.models import Rows, build, init_variables
from moejax.sampling import Sampling, next_tokens

CONFIG = ModelConfig(
  vocab_size=259, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1,
  head_dim=8, dtype="float32", init_std=0.3,
  moe=MoEConfig(num_experts=4, d_expert=8, router="top_k(k=2)"),
)  # fmt: skip
KEY = jax.random.key(0)
PROMPTS = [[5, 6, 7], [9], list(range(40, 52))]


@pytest.fixture(scope="module")
def model_and_variables():
  model = build(CONFIG)
  return model, init_variables(model, jax.random.key(1))


def greedy_by_hand(model, variables, prompt, n):
  """Each token from a full forward pass over all before it."""
  forward = jax.jit(
    lambda tokens, rows: model.apply(
      variables,
      model.apply(variables, tokens, rows).hidden_BTD,
      method="logits",
    )
  )
  tokens = list(prompt)
  for _ in range(n):
    padded = (
      jnp.zeros((1, 24), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
    )
    segments = (jnp.arange(24) < len(tokens)).astype(jnp.int32)[None]
    logits = forward(padded, Rows(segments, jnp.arange(24)[None]))
    tokens.append(int(logits[0, len(tokens) - 1].argmax()))
  return tokens[len(prompt) :]


def test_greedy_in_a_batch_equals_full_forward_passes(model_and_variables):
  model, variables = model_and_variables
  got = generate_tokens(model, variables, PROMPTS, 9, Sampling(), KEY)
  want = [greedy_by_hand(model, variables, p, 9) for p in PROMPTS]
  assert got == want


def test_stop_tokens_end_a_row_and_not_its_neighbours(model_and_variables):
  model, variables = model_and_variables
  free = generate_tokens(model, variables, PROMPTS, 9, Sampling(), KEY)
  stop = free[0][4]
  first = free[0].index(stop)
  seen = []
  got = generate_tokens(
    model, variables, PROMPTS, 9, Sampling(), KEY, stop_ids=[stop],
    on_tokens=seen.append,
  )  # fmt: skip
  for row, whole in zip(got, free, strict=True):
    end = whole.index(stop) if stop in whole else 9
    assert row == whole[:end]
  assert [step[0] for step in seen][: first + 1] == [*free[0][:first], None]


def test_a_rows_draws_do_not_depend_on_its_neighbours(model_and_variables):
  model, variables = model_and_variables
  sampling = Sampling(temperature=1.0)
  together = generate_tokens(model, variables, PROMPTS, 6, sampling, KEY)
  alone = generate_tokens(model, variables, PROMPTS[:1], 6, sampling, KEY)
  assert together[0] == alone[0]
  other = generate_tokens(
    model, variables, PROMPTS, 6, sampling, jax.random.key(9)
  )
  assert other != together


def draws(sampling, logits, n=4000):
  keys = jax.random.split(KEY, n)
  rows = jnp.tile(jnp.asarray(logits, jnp.float32), (n, 1))
  tokens = np.asarray(next_tokens(sampling, rows, keys))
  return np.bincount(tokens, minlength=len(logits)) / n


LOGITS = np.log([0.5, 0.25, 0.15, 0.1])


@pytest.mark.parametrize(
  "sampling,expected",
  [
    (Sampling(0.0), [1, 0, 0, 0]),
    (Sampling(1e-39), [1, 0, 0, 0]),
    (Sampling(1e-5), [1, 0, 0, 0]),
    (Sampling(1.0), [0.5, 0.25, 0.15, 0.1]),
    (Sampling(0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
    (Sampling(1.0, top_k=2), [2 / 3, 1 / 3, 0, 0]),
    (Sampling(1.0, top_k=9), [0.5, 0.25, 0.15, 0.1]),
    (Sampling(1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
    (Sampling(1.0, top_p=0.4), [1, 0, 0, 0]),
    (Sampling(1.0, top_p=0.76), np.array([0.5, 0.25, 0.15, 0]) / 0.9),
    (Sampling(1.0, top_k=3, top_p=0.8), np.array([0.5, 0.25, 0, 0]) / 0.75),
  ],
  ids=str,
)
def test_sampling_frequencies(sampling, expected):
  np.testing.assert_allclose(draws(sampling, LOGITS), expected, atol=0.03)


@pytest.mark.parametrize(
  "options,message",
  [
    ({"temperature": -1.0}, "temperature=-1.0 is not a number >= 0"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"temperature": float("inf")}, "temperature=inf"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
  ],
)
def test_impossible_sampling_is_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    Sampling(**options)


def test_bad_prompts_are_refused(model_and_variables):
  model, variables = model_and_variables
  with pytest.raises(ConfigError, match="token id 300 is beyond"):
    generate_tokens(model, variables, [[300]], 1, Sampling(), KEY)
  with pytest.raises(ConfigError, match="empty prompt"):
    generate_tokens(model, variables, [[]], 1, Sampling(), KEY)


def test_a_cache_beyond_the_memory_is_refused(model_and_variables):
  model, variables = model_and_variables
  with pytest.raises(ConfigError, match="TiB, this machine has .*fewer tokens"):
    generate_tokens(model, variables, [[1]], 10**11, Sampling(), KEY)


def test_bytes_that_are_no_text_become_a_replacement_sign():
  ids = prompt_tokens(load_tokenizer("byte"), "a\udcff")  # as a shell gives it
  assert bytes(ids[1:]).decode() == "a\ufffd"


def test_a_router_that_looks_ahead_is_refused(tmp_path, monkeypatch):
  (tmp_path / "ahead.py").write_text(
    "from moejax.routing import non_causal, top_k\n"
    "@non_causal\n"
    "def ahead(logits_TE, mask_T, *, k, rng=None):\n"
    "  return top_k(logits_TE, mask_T, k=k)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  moe = dataclasses.replace(CONFIG.moe, router="ahead.ahead(k=1)")
  model = build(dataclasses.replace(CONFIG, moe=moe))
  with pytest.raises(ConfigError, match="looks at later tokens"):
    generate_tokens(model, {}, [[1]], 1, Sampling(), KEY)


def test_text_in_text_out(model_and_variables):
  model, variables = model_and_variables
  tokenizer = load_tokenizer("byte")
  texts = generate(model, variables, tokenizer, ["", "héllo"], 5)
  assert len(texts) == 2
  assert all(isinstance(text, str) for text in texts)
