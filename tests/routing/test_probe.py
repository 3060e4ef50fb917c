# SPDX-License-Identifier: Apache-2.0
"""Wrong routers are told before they train; right ones pass, all of them."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moejax import routing
from moejax.config import ModelConfig, MoEConfig
from moejax.errors import ConfigError
from moejax.models import Rows, build, count, init_variables
from moejax.routing import Routing, resolve
from moejax.routing.naming import routers_of
from moejax.routing.probe import probe
from moejax.spec import Spec

E = 8
# Each built-in router once, with what it cannot do without.
EXAMPLES = {
  "attention_heads": "attention_heads(k=2)",
  "expert_choice": "expert_choice(k=2, group_size=8)",
  "forced_balance": "forced_balance(k=2)",
  "group_limited": "group_limited(k=2, num_groups=4, topk_groups=2)",
  "hash_tokens": "hash_tokens(k=2)",
  "loss_free": "loss_free(k=2)",
  "noisy_top_k": "noisy_top_k(k=2)",
  "null_experts": "null_experts(k=2, num_null=3)",
  "random_choice": "random_choice(k=2)",
  "recycle": "recycle(group_size=8)",
  "sinkhorn": "sinkhorn(k=2, group_size=8)",
  "switch": "switch(k=2, group_size=8)",
  "top_k": "top_k(k=2)",
  "top_p": "top_p(p=0.5, k=2)",
}


def model_of(router):
  return ModelConfig(
    vocab_size=7, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=8, dtype="float32",
    moe=MoEConfig(num_experts=E, d_expert=4, router=router),
  )  # fmt: skip


def test_there_is_an_example_of_each():
  assert sorted(EXAMPLES) == routers_of(routing)


def test_the_page_of_routers_has_each():
  page = Path(__file__).parents[2] / "docs" / "routers.md"
  found = re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)
  assert sorted(found) == sorted(EXAMPLES)


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=EXAMPLES)
def test_each_router_in_a_model(text):
  """It passes, initialises, and its parameters are those that are counted."""
  config = model_of(text)
  probe(resolve(config.moe.router_spec), E, text)
  variables = init_variables(build(config), jax.random.key(0))
  sizes = sum(x.size for x in jax.tree.leaves(variables))
  assert sizes == count(config).num_params


def beyond(logits_TE, mask_T, *, k=1, rng=None):
  T = logits_TE.shape[0]
  best_T1 = jnp.argmax(logits_TE, axis=-1)[:, None] + 3
  return Routing.from_token_choice(best_T1, jnp.ones((T, 1)), logits_TE, mask_T)


def below(logits_TE, mask_T, *, k=1, rng=None):
  T = logits_TE.shape[0]
  experts_T1 = jnp.full((T, 1), -1)
  return Routing.from_token_choice(
    experts_T1, jnp.ones((T, 1)), logits_TE, mask_T
  )


def only_in_training(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  if rng is None:
    return good
  return good.replace(weight_A=good.weight_A / 0.0)


def pads_too(logits_TE, mask_T, *, k=1, rng=None):
  return routing.top_k(logits_TE, jnp.ones_like(mask_T), k=1)


def looks_ahead(logits_TE, mask_T, *, k=1, rng=None):
  centred_TE = logits_TE - logits_TE.mean(0, keepdims=True)
  return routing.top_k(centred_TE, mask_T, k=1).replace(logits_TE=logits_TE)


def other_tokens(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(token_A=good.token_A + 5, experts_per_token=0)


def out_of_order(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(token_A=good.token_A[::-1])


def other_logits(logits_TE, mask_T, *, k=1, rng=None):
  return routing.top_k(logits_TE[:, :-1], mask_T, k=1)


def float_experts(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(expert_A=good.expert_A.astype(jnp.float32))


def over_capacity(logits_TE, mask_T, *, k=1, rng=None):
  return routing.top_k(logits_TE, mask_T, k=1).replace(capacity=1)


def no_shares(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(prob_TE=jnp.full(logits_TE.shape, jnp.nan))


def shares_of_others(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(prob_TE=jnp.ones((3, 2)))


def wanted_below(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(wanted_A=good.expert_A - 9)


def wanted_beyond(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(wanted_A=good.expert_A + E)


def counted_beyond(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(counted_A=good.expert_A + 100)


def counted_floats(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(counted_A=good.weight_A)


def negative_shares(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  prob_TE = jnp.zeros(logits_TE.shape).at[:, :3].set(jnp.array([3, -3, 1]))
  return good.replace(prob_TE=prob_TE)


def no_logits(logits_TE, mask_T, *, k=1, rng=None):
  good = routing.top_k(logits_TE, mask_T, k=1)
  return good.replace(logits_TE=logits_TE.at[2, 3].set(jnp.nan))


def same_twice(logits_TE, mask_T, *, k=2, rng=None):
  best_T1 = jnp.argmax(logits_TE, axis=-1)[:, None]
  half_TX = jnp.full((logits_TE.shape[0], 2), 0.5)
  twice_TX = jnp.repeat(best_T1, 2, axis=1)
  return Routing.from_token_choice(twice_TX, half_TX, logits_TE, mask_T)


def two_of_one(logits_TE, mask_T, *, rng=None):
  return routing.top_k(logits_TE, mask_T, k=2)


@pytest.mark.parametrize(
  "router, message",
  [
    (beyond, r"test_probe.py:\d+\): experts from 3 to \d+, but there are 8"),
    (below, "experts from -1 to 8, but there are 8, from 0 to 7"),
    (only_in_training, "weight_A has numbers that are not finite"),
    (pads_too, "sends padding to experts; where mask_T is False"),
    (looks_ahead, "depend on later tokens; mark it with"),
    (other_tokens, "tokens from 5 to 20, but there are 16"),
    (out_of_order, "assignment a must be of token a // 1"),
    (other_logits, r"is \(16, 7\), not \(16, 8\) as it was given"),
    (float_experts, "expert_A is float32, not integers"),
    (over_capacity, r"capacity=1, but an expert has \d+ tokens"),
    (no_shares, "prob_TE must be shares that sum to 1, not to nan"),
    (shares_of_others, r"prob_TE is \(3, 2\), not \(16, 8\)"),
    (wanted_below, "wanted_A has experts below 0"),
    (
      wanted_beyond,
      r"wanted_A has .* 1\d, but there are 8, from 0 to 7",
    ),
    (counted_beyond, r"counted_A has experts up to 10\d, but there are 8"),
    (counted_floats, "counted_A is float32, not integers"),
    (negative_shares, "prob_TE must be shares from 0 to 1, not from -3 to 3"),
    (
      no_logits,
      "logits_TE or null_TN of its Routing have numbers that",
    ),
    (two_of_one, "gives each token 2 experts, its name says k=1"),
  ],
)
def test_what_a_router_got_wrong_is_named(router, message):
  config = model_of(f"{__name__}.{router.__name__}")
  with pytest.raises(ConfigError, match=message):
    init_variables(build(config), jax.random.key(0))


def test_one_expert_twice_for_a_token_is_named():
  config = model_of(f"{__name__}.same_twice(k=2)")
  with pytest.raises(ConfigError, match=r"token 0 has expert \d 2 times, and"):
    init_variables(build(config), jax.random.key(0))


def test_groups_must_lie_within_rows():
  """They would depend on how a batch is split, and no one would see it."""
  config = model_of("expert_choice(k=2, group_size=8)")
  model = build(config)
  variables = init_variables(model, jax.random.key(0))
  rows = Rows(jnp.ones((4, 6), jnp.int32), jnp.arange(24).reshape(4, 6) % 6)
  with pytest.raises(ConfigError, match="of 6 tokens are not groups of 8"):
    model.apply(variables, jnp.zeros((4, 6), jnp.int32), rows)


@pytest.mark.parametrize(
  "text, message",
  [
    ("loss_free(k=2, bias_E=1)", "given its bias_E by the model; leave it out"),
    ("hash_tokens(token_T=1)", "given its token_T by the model"),
    ("noisy_top_k(k=2, noise_TE=0)", "given its noise_TE by the model"),
    ("top_p(p='a', k=2)", "top_p: p='a' must be float, not str"),
    ("switch(group_size=8.0)", "group_size=8.0 must be int, not float"),
    ("loss_free(k=2, bias_rate='a')", "bias_rate='a' must be float"),
    ("top_k(k=2, renormalise=True)", "did you mean 'renormalize'. its options"),
  ],
)
def test_options_that_are_no_options(text, message):
  with pytest.raises(ConfigError, match=message):
    resolve(Spec.parse(text))


@pytest.mark.parametrize(
  "text, message",
  [
    ("switch(group_size=0)", "group_size=0 must be a positive integer"),
    ("expert_choice(k=2, group_size=-8)", "group_size=-8 must be a positive"),
    ("sinkhorn(k=2, group_size=8, iterations=0)", "iterations=0 must be"),
    ("loss_free(k=2, bias_rate=-1)", "bias_rate=-1 must be 0 or more: below"),
    ("group_limited(k=2, bias_rate=-0.1)", "bias_rate=-0.1 must be 0 or more"),
    ("group_limited(k=2, scale=0)", "scale=0 must be positive: at 0 experts"),
    ("group_limited(k=2, scale=-1.0)", "scale=-1.0 must be positive"),
  ],
)
def test_options_that_cannot_be(text, message):
  with pytest.raises(ConfigError, match=message):
    init_variables(build(model_of(text)), jax.random.key(0))


def test_padded_buffers_need_a_capacity():
  config = model_of("top_k(k=2)")
  moe = dataclasses.replace(config.moe, dispatch="padded")
  model = build(dataclasses.replace(config, moe=moe))
  variables = init_variables(model, jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 1)
  rows = Rows(jnp.ones((1, 4), jnp.int32), jnp.arange(4)[None], keys)
  with pytest.raises(ConfigError, match="'top_k.k=2.' has none: use ragged"):
    model.apply(variables, jnp.zeros((1, 4), jnp.int32), rows)


def test_a_width_must_be_a_number():
  config = model_of("null_experts(k=2, num_null=0)")
  with pytest.raises(ConfigError, match="num_null=0 must be a positive"):
    count(config)


def test_moa_layers_need_token_choice():
  config = ModelConfig(
    vocab_size=7, d_model=8, num_layers=1, num_heads=4, num_kv_heads=2,
    head_dim=8, dtype="float32", qk_norm="none", pattern=("moa/moe",),
    moe=MoEConfig(
      num_experts=E, d_expert=4, router="expert_choice(k=2, group_size=8)"
    ),
  )  # fmt: skip
  with pytest.raises(ConfigError, match="no fixed number of experts"):
    init_variables(build(config), jax.random.key(0))
