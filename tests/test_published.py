# SPDX-License-Identifier: Apache-2.0
"""Configs of the published systems: exact counts, real trees."""

import math
from pathlib import Path

import jax
import pytest

from moejax.cli import parse_config
from moejax.config import phases_of
from moejax.errors import ConfigError
from moejax.models import build, count, kv_bytes_per_token
from moejax.models.rope import rope_frequencies
from moejax.optimizer import run_schedule
from moejax.step import init_state

CONFIGS = Path(__file__).parents[1] / "configs"
# (all, active) parameters, counted from the authors' shapes.
PUBLISHED = {
  "olmoe_1b_7b": (6_919_161_856, 1_282_017_280),
  "jetmoe_8b": (8_522_237_952, 2_331_445_248),
  "dbrx_132b": (131_596_523_520, 36_469_708_800),
  "hunyuan_large": (388_698_128_640, 51_318_800_640),
  "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
  "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),
  "flex_olmo_7x7b": (33_270_665_216, 24_613_621_760),
  "deepseek_v3": (671_026_419_200, 37_552_297_472),  # one prediction head
}


def read(name, arg=""):
  return parse_config(f"{CONFIGS / name}.py{arg}", [])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("arg", ["", ":tiny"])
def test_counts_are_those_published_and_of_the_real_tree(name, arg):
  config = read(name, arg)
  counts = count(config.model)
  if not arg:
    assert (counts.num_params, counts.num_active_params) == PUBLISHED[name]
  model = build(config.model)
  state = jax.eval_shape(lambda: init_state(config, model))
  size = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  assert size(state.variables) == counts.num_params
  routers = sum(layer.num_routers for layer in config.model.layers)
  biased = "group_limited" in config.model.moe.router
  assert size(state.router_state) == biased * routers * (
    config.model.moe.num_experts
  )
  assert size(state.opt_state) >= 2 * size(state.params)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_keeps_the_architecture_and_differs_in_all_sizes(name):
  full, tiny = read(name).model, read(name, ":tiny").model
  for kept in (
    "pattern", "prefix", "qk_norm", "clip_qkv", "norm", "norm_position",
    "norm_eps", "final_norm_eps", "rope_theta", "rope_scaling",
    "tie_embeddings",
  ):  # fmt: skip
    assert getattr(full, kept) == getattr(tiny, kept), kept
  assert full.moe.output_bias == tiny.moe.output_bias
  assert full.moe.num_shared_experts == tiny.moe.num_shared_experts
  sizes = [
    tiny.d_model, tiny.num_heads * tiny.head_dim, tiny.moe.d_expert,
    tiny.vocab_size, tiny.moe.num_experts,
  ]  # fmt: skip
  if full.num_kv_heads != full.num_heads:
    sizes.append(tiny.num_kv_heads * tiny.head_dim)
  # All heads together are D wide there, also in config.json's words.
  allowed = name in ("olmoe_1b_7b", "dbrx_132b", "flex_olmo_7x7b")
  assert len(set(sizes)) + allowed == len(sizes), sizes


def test_olmoes_cosine_ends_at_five_trillion_tokens():
  """Its t_max is not the end of the run: the rate is flat, then annealed."""
  config = read("olmoe_1b_7b")
  tokens = config.train.batch_size * config.data.seq_len
  warmup, end, flat = 2500, math.ceil(5e12 / tokens), 1_200_000
  last = config.train.num_steps

  def closed_form(done):
    """The rate of a step, `done` with it."""
    if done <= warmup:
      return 4e-4 * done / warmup
    if done <= end:
      t = (done - warmup) / (end - warmup)
      return 4e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2)
    return 4e-5 * min(1, (last - done) / (last - flat))

  schedule = run_schedule(config)
  ends = [at + d for at in (2500, end, flat) for d in (-1, 0, 1)]
  for done in (1, *ends, 300_000, 600_000, 1_100_000, 1_212_000, last):
    got = float(schedule(done - 1))
    # A few roundings in float32 of sums as large as the peak.
    assert abs(got - closed_form(done)) < 4 * 4e-4 * 2.0**-24, done


def test_hunyuan_keeps_a_twentieth_of_plain_attentions_cache():
  model = read("hunyuan_large").model
  plain = model.num_layers * 2 * model.num_heads * model.head_dim * 2
  assert kv_bytes_per_token(model) == 2 * 8 * 80 * 64  # 2 n_g d_h L, bf16
  assert kv_bytes_per_token(model) / plain == 0.05


def test_hunyuans_base_is_raised_at_256k_alone():
  """The base that angles turn by, not what an option says."""
  bases = {}
  for phase in phases_of(read("hunyuan_large")):
    model = phase.config.model
    turns_H = rope_frequencies(
      model.rope_dim, model.rope_theta, model.rope_scaling_spec
    )
    bases[phase.name] = float(turns_H[1]) ** (-model.rope_dim / 2)
  assert bases == pytest.approx(
    {"main": 1e4, "anneal": 1e4, "32k": 1e4, "256k": 1_343_399_332.6}, rel=1e-4
  )


def test_an_unknown_variant_names_the_one_there_is():
  with pytest.raises(ConfigError, match="no variant 'small'; there is 'tiny'"):
    read("dbrx_132b", ":small")
