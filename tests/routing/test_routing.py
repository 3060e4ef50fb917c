# SPDX-License-Identifier: Apache-2.0
"""What is said of routers that return something else than they should."""

import jax
import jax.numpy as jnp
import pytest

from moejax.config import ModelConfig, MoEConfig
from moejax.errors import ConfigError
from moejax.models import build, init_variables
from moejax.routing import Routing, resolve
from moejax.spec import Spec

MASK_T = jnp.ones(4, bool)
LOGITS_TE = jnp.zeros((4, 5))


def swapped(logits_TE, mask_T, *, rng=None):
  weight_TX, expert_TX = jax.lax.top_k(logits_TE, 2)
  return Routing.from_token_choice(weight_TX, expert_TX, logits_TE, mask_T)


def one_weight(logits_TE, mask_T, *, rng=None):
  weight_TX, expert_TX = jax.lax.top_k(logits_TE, 2)
  return Routing.from_token_choice(
    expert_TX, weight_TX[:, :1], logits_TE, mask_T
  )


def bare_tuple(logits_TE, mask_T, *, rng=None):
  return jax.lax.top_k(logits_TE, 2)


def uneven(logits_TE, mask_T, *, rng=None):
  good = resolve(Spec("top_k", {"k": 2}))(logits_TE, mask_T, rng=rng)
  return good.replace(weight_A=good.weight_A[1:])


@pytest.mark.parametrize(
  "router, message",
  [
    (swapped, "experts are float32, not integers; the order is"),
    (one_weight, r"weights \(16, 1\) for logits \(16, 5\); both must be"),
    (bare_tuple, r"bare_tuple \(.*routing.py:\d+\) returned list, not a Rou"),
    (uneven, r"token_A \(32,\), expert_A \(32,\), weight_A \(31,\) must be"),
  ],
)
def test_a_wrong_result_is_one_line(router, message):
  config = ModelConfig(
    vocab_size=7, d_model=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=8, dtype="float32",
    moe=MoEConfig(
      num_experts=5, d_expert=4, router=f"{__name__}.{router.__name__}"
    ),
  )  # fmt: skip
  with pytest.raises(ConfigError, match=message):
    init_variables(build(config), jax.random.key(0))


def test_an_unknown_option_is_named_before_a_missing_one():
  with pytest.raises(ConfigError, match="no option q; its options: k, score"):
    resolve(Spec("top_k", {"q": 2}))
