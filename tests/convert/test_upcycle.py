# SPDX-License-Identifier: Apache-2.0
"""Dense runs as mixtures of experts: the same function where it is promised."""

import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from moejax import runs
from moejax.checkpoint.leaves import named_leaves
from moejax.convert.slices import SliceWeights
from moejax.convert.upcycle import Recipe, upcycle
from moejax.errors import ConfigError
from moejax.models import Rows, build
from moejax.step import init_state
from tests.convert.dense_runs import (
  PLAIN,
  RENORMALIZED,
  B,
  F,
  L,
  T,
  V,
  at,
  dense_run,
  error,
  leaves,
  sparse,
)
from tests.fresh_run import fresh_run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return dense_run(tmp_path_factory.mktemp("source") / "dense")


def test_the_mlps_matter(source, tmp_path):
  """Else equal logits would say nothing."""
  run = runs.load_run(source)
  mlp = run.variables["params"]["repeats_2"]["block_0"]["mlp"]
  mlp["w_down_FD"] = jnp.roll(mlp["w_down_FD"], 1, axis=0)
  other = fresh_run(tmp_path / "rolled", run.config, run.variables)
  assert error(other, source) > 0.1


@pytest.mark.parametrize(
  "granularity, num_experts, router, factor",
  [
    (1, 8, RENORMALIZED, 1),
    (1, 8, "top_k(k=2, renormalize=True, jitter=0.1)", 1),
    (1, 6, "top_k(k=3, renormalize=True, score='sigmoid')", 1),
    (1, 8, "group_limited(k=4, num_groups=4, topk_groups=2, scale=2.5)", 0.4),
    (2, 8, RENORMALIZED, 2),
    (2, 10, "top_k(k=4, renormalize=True)", 2),
    (2, 8, "group_limited(k=2, scale=2.5)", 0.8),
    (4, 8, "top_k(k=4, renormalize=True)", 4),
    (4, 4, "top_k(k=4, renormalize=True)", 4),
  ],
)
def test_logits_are_the_dense_models(
  granularity, num_experts, router, factor, source, tmp_path, capsys
):
  moe = {"num_experts": num_experts, "router": router}
  moe["d_expert"] = F // granularity
  upcycle(source, sparse(moe=moe), tmp_path / "moe", Recipe(granularity))
  out = capsys.readouterr().out
  assert "logits are the dense model's" in out and "note" not in out
  assert (f"down projections are times {factor:g}" in out) == (factor != 1)
  assert error(tmp_path / "moe", source) < 1e-5


LAYOUTS = [
  # What the source has, what the new model has.
  ({"scan_layers": True}, {}),
  ({}, {"scan_layers": True}),
  ({"scan_layers": True}, {"scan_layers": True}),
  ({}, {"pattern": ("attention/mlp", "attention/moe")}),
  (
    {"scan_layers": True},
    {"pattern": ("attention/moe", "attention/mlp"), "scan_layers": True},
  ),
  ({"scan_layers": True}, {"prefix": ("attention/mlp",)}),
  ({}, {"prefix": ("attention/moe",), "pattern": ("attention/mlp",)}),
  ({"prefix": ("attention/mlp",) * 2}, {"pattern": ("attention/moe",) * 2}),
  (
    {"prefix": ("attention/mlp",), "scan_layers": True},
    {
      "prefix": ("attention/mlp", "attention/moe"),
      "pattern": ("attention/mlp", "attention/moe"),
    },
  ),
  (
    {"pattern": ("attention/mlp", "shared_kv/mlp"), "qk_norm": "none"},
    {"pattern": ("attention/mlp", "shared_kv/moe"), "qk_norm": "none"},
  ),
  (
    {"norm": "layer", "norm_position": "post", "tie_embeddings": True},
    {"norm": "layer", "norm_position": "post", "tie_embeddings": True},
  ),
]


@pytest.mark.parametrize("theirs, ours", LAYOUTS)
def test_layers_lie_as_they_like(theirs, ours, tmp_path):
  source = dense_run(tmp_path / "dense", **theirs)
  config = sparse(moe={"d_expert": F // 2}, **ours)
  upcycle(source, config, tmp_path / "moe", Recipe(granularity=2))
  assert error(tmp_path / "moe", source) < 1e-5


@pytest.mark.parametrize(
  "granularity, router, why",
  [
    (1, "top_k(k=2)", r"weights of a token sum to 0.3\d? to 0.9\d?"),
    (1, "top_k(k=1)", "weights of a token sum to"),
    (1, "top_k(k=2, score='sigmoid')", "weights of a token sum to"),
    (2, "top_k(k=2)", "weights of a token sum to .*projections are times 2"),
    (2, "top_k(k=3, renormalize=True)", "k=3 experts .* 2 slices.*use k=4"),
    (4, RENORMALIZED, "k=2 experts .* 4 slices alike; use k=4"),
  ],
)
def test_where_logits_change_it_is_said(
  granularity, router, why, source, tmp_path, capsys
):
  config = sparse(moe={"router": router, "d_expert": F // granularity})
  upcycle(source, config, tmp_path / "moe", Recipe(granularity))
  assert error(tmp_path / "moe", source) > 0.01
  (line,) = [x for x in capsys.readouterr().out.splitlines() if "note:" in x]
  assert line.startswith("note: logits are not the dense model's: ")
  assert re.search(why, line)


def test_noise_that_parts_slices_is_said(source, tmp_path, capsys):
  router = "top_k(k=2, renormalize=True, jitter=0.1)"
  config = sparse(moe={"router": router, "d_expert": F // 2})
  upcycle(source, config, tmp_path / "moe", Recipe(granularity=2))
  out = capsys.readouterr().out
  assert "note: not so in training: the router's noise breaks the ties" in out
  assert error(tmp_path / "moe", source) < 1e-5


FULL, TORN, SUMS = (
  "of random tokens find an expert full, at every step",
  "the router's noise breaks the ties",
  "a token's weights sum to 1 to 2",
)
SWITCH = "switch(group_size=32, k=2, renormalize=True, {})"
ODD = "tests.convert.odd_routers."


@pytest.mark.parametrize(
  "granularity, router, said",
  [
    (1, SWITCH.format("capacity_factor=1.25"), {FULL}),
    (1, SWITCH.format("jitter=0.01"), {FULL}),
    (1, SWITCH.format("capacity_factor=4.0"), set()),  # a place for everybody
    (2, SWITCH.format("capacity_factor=1.25"), {FULL}),
    (2, SWITCH.format("capacity_factor=4.0, jitter=0.01"), {TORN}),
    (2, SWITCH.format("jitter=0.01"), {FULL, TORN}),
    (1, f"{ODD}sparing()", set()),
    (2, f"{ODD}sparing()", {TORN}),
    (1, f"{ODD}louder()", {SUMS}),
  ],
)
def test_why_training_is_not_the_dense_model_is_said(granularity, router, said):
  model = sparse(moe={"router": router, "d_expert": F // granularity}).model
  lines = SliceWeights.of(model, granularity).report("")
  assert lines[0].startswith("logits are the dense model's: ")
  assert len(lines) == 1 + bool(said)
  notes = "".join(lines[1:])
  assert notes.startswith("note: not so in training: " if said else "")
  assert {x for x in (FULL, TORN, SUMS) if x in notes} == said


def test_how_many_find_an_expert_full():
  """Two tokens share one place an expert: all pairs of choices, counted."""
  full = []
  for a in itertools.permutations(range(8), 2):
    for b in itertools.permutations(range(8), 2):
      full.append(a[1] == b[0])
      full.append(b[0] == a[0] or b[1] in a)
  router = "switch(group_size=2, k=2, renormalize=True, capacity_factor=0.5)"
  weights = SliceWeights.of(sparse(moe={"router": router}).model, 1)
  share = (weights.missing_T > 0).mean()
  assert len(weights.missing_T) == 2048
  assert abs(share - np.mean(full)) < 0.04  # four times its deviation at most
  shown = f"{share:.0%} {FULL}"
  assert shown in weights.report("")[1]
  np.testing.assert_array_equal(
    weights.train_TG[:, 0] < 1 - 1e-6, weights.missing_T > 0
  )


@pytest.mark.parametrize("full, said", [(1, "<1%"), (9, "<1%"), (20, "1%")])
def test_few_that_find_an_expert_full_are_not_none(full, said):
  """Of 2,000 tokens one is 0.05%, which rounds to nothing."""
  missing_T = (np.arange(2000) < full).astype(int)
  train_TG = 1.0 - 0.5 * missing_T[:, None]
  weights = SliceWeights(np.ones((2000, 1)), train_TG, missing_T, 2)
  assert f": {said} {FULL}" in weights.report("")[1]


def test_what_a_dense_config_says_of_experts_does_not_matter(tmp_path):
  """Its default router asks for eight of the four."""
  moe = {"num_experts": 4, "d_expert": 7}
  source = dense_run(tmp_path / "dense", moe=moe)
  upcycle(source, sparse(), tmp_path / "moe", PLAIN)
  assert error(tmp_path / "moe", source) < 1e-5


@pytest.mark.parametrize("stacked", [False, True])
def test_every_weight_is_a_copy_or_drawn(stacked, tmp_path):
  """Drawn as a fresh run does: stacked layers by other keys than layers apart.

  The digest of what is made tells the two from each other.
  """
  source = dense_run(tmp_path / "dense", scan_layers=True)
  pattern = ("attention/mlp", "attention/moe")
  config = sparse(pattern, seed=5, scan_layers=stacked)
  upcycle(source, config, tmp_path / "moe", PLAIN)
  other = sparse(pattern, seed=5, scan_layers=not stacked)
  with pytest.raises(ConfigError, match="holds another checkpoint"):
    upcycle(source, other, tmp_path / "moe", PLAIN)
  old, new = leaves(source), leaves(tmp_path / "moe")
  fresh = init_state(config, build(config.model)).params
  for name in ("w_embed_VD", "w_output_VD", "final_norm/scale"):
    np.testing.assert_array_equal(new[f"params/{name}"], old[f"params/{name}"])
  unseen = {name for name in new if "repeats" in name}
  for layer in range(L):
    mine = f"params/repeats_{layer // 2}/block_{layer % 2}/"
    theirs = "params/repeats/block_0/"
    for name in (n.removeprefix(mine) for n in new if n.startswith(mine)):
      unseen.remove(mine + name)
      if name == "moe/w_router_DE":
        r = layer // 2
        repeat = fresh["repeats" if stacked else f"repeats_{r}"]
        want = repeat["block_1"]["moe"]["w_router_DE"]
        want = want[r] if stacked else want
      elif name.startswith("moe/"):
        of_mlp = name[4:].replace("_EDF", "_DF").replace("_EFD", "_FD")
        want = old[f"{theirs}mlp/{of_mlp}"][layer]
        want = np.broadcast_to(want, (8, *want.shape))
      else:
        want = old[theirs + name][layer]
      np.testing.assert_array_equal(new[mine + name], want, err_msg=name)
  assert not unseen


def test_experts_of_a_group_are_the_slices(source, tmp_path):
  moe = {"d_expert": F // 2, "num_experts": 6}
  upcycle(source, sparse(moe=moe), tmp_path / "moe", Recipe(granularity=2))
  old, new = leaves(source), leaves(tmp_path / "moe")
  for e in range(6):
    part = slice(0, F // 2) if e % 2 == 0 else slice(F // 2, F)
    for name, want in (
      ("w_gate_EDF", old[at(1, "mlp/w_gate_DF")][:, part]),
      ("w_up_EDF", old[at(1, "mlp/w_up_DF")][:, part]),
      ("w_down_EFD", 2 * old[at(1, "mlp/w_down_FD")][part]),
    ):
      np.testing.assert_array_equal(new[at(1, f"moe/{name}")][e], want)
  w_DE = new[at(1, "moe/w_router_DE")]
  np.testing.assert_array_equal(w_DE[:, ::2], w_DE[:, 1::2])
  assert len(np.unique(w_DE[0])) == 3


@pytest.mark.parametrize("share", [0.5, 0.1, 1.0])
def test_the_share_of_noise(share, source, tmp_path, capsys):
  recipe = Recipe(granularity=2, noise=share, noise_std=0.05)
  config = sparse(moe={"d_expert": F // 2})
  upcycle(source, config, tmp_path / "moe", recipe)
  out = capsys.readouterr().out
  drawn = f"{share:.0%} of the experts' entries are drawn from N(0, 0.05)"
  assert f"note: logits are not the dense model's: {drawn};" in out
  upcycle(source, config, tmp_path / "calm", Recipe(granularity=2))
  noisy, calm = leaves(tmp_path / "moe"), leaves(tmp_path / "calm")
  masks, drawn = [], []
  for name, leaf in noisy.items():
    mask = leaf != calm[name]
    if not name.endswith(("_EDF", "_EFD")):
      assert not mask.any(), name
      continue
    masks.append(mask.reshape(8, -1))
    drawn.append(leaf[mask])
  drawn = np.concatenate(drawn)
  count = sum(m.size for m in masks)
  assert (
    abs(len(drawn) / count - share) <= 5 * (share * (1 - share) / count) ** 0.5
  )
  assert abs(drawn.std() / 0.05 - 1) < 5 / (2 * len(drawn)) ** 0.5
  assert abs(drawn.mean()) < 5 * 0.05 / len(drawn) ** 0.5
  if share == 1:
    return
  # Each expert, matrix and layer has draws of its own.
  for one, two in itertools.combinations(np.concatenate(masks), 2):
    both = (one & two).mean()
    spread = (share**2 * (1 - share**2) / one.size) ** 0.5
    assert abs(both - share**2) < 6 * spread


def test_the_seed_decides(source, tmp_path):
  for name, seed in (("one", 3), ("two", 3), ("other", 4)):
    upcycle(source, sparse(seed=seed), tmp_path / name, Recipe(noise=0.5))
  one, two, other = (leaves(tmp_path / x) for x in ("one", "two", "other"))
  for name, leaf in one.items():
    np.testing.assert_array_equal(leaf, two[name])
    assert np.array_equal(leaf, other[name]) == ("/moe/" not in name), name


def test_weights_become_float32(tmp_path):
  source = dense_run(tmp_path / "dense", dtype=ml_dtypes.bfloat16)
  upcycle(source, sparse(), tmp_path / "moe", PLAIN)
  new = leaves(tmp_path / "moe")
  assert {x.dtype for x in new.values()} == {np.dtype("float32")}
  want = leaves(source)[at(0, "mlp/w_up_DF")].astype(np.float32)
  np.testing.assert_array_equal(new[at(0, "moe/w_up_EDF")][7], want)


def test_a_bias_and_a_balancing_bias_begin_at_zero(source, tmp_path):
  moe = {"router": "group_limited(k=2)", "output_bias": True}
  upcycle(source, sparse(moe=moe), tmp_path / "moe", PLAIN)
  new = leaves(tmp_path / "moe")
  biases = [n for n in new if n.endswith(("bias_D", "router_bias_E"))]
  assert len(biases) == 2 * L
  assert not any(new[n].any() for n in biases)
  assert error(tmp_path / "moe", source) < 1e-5


def gradients(folder):
  """Of the next-token loss, and the assignments of each expert, [R, E]."""
  run = runs.load_run(folder)
  tokens = np.random.default_rng(0).integers(0, V, (B, T + 1))
  rows = Rows(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))

  def loss(variables):
    out = run.model.apply(variables, tokens[:, :-1], rows)
    logits = run.model.apply(variables, out.hidden_BTD, method="logits")
    xent = optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    )
    counts = None if out.stats is None else out.stats.count_BE.sum(1)
    return xent.mean(), counts

  grads, counts = jax.grad(loss, has_aux=True)(run.variables)
  return {k: np.asarray(v) for k, v in named_leaves(grads).items()}, counts


@pytest.mark.parametrize("granularity", [1, 2])
def test_gradients_of_experts_sum_to_the_dense_ones(
  granularity, source, tmp_path
):
  """By the chain rule: weights sum to 1, and the copies are equal."""
  G = granularity
  config = sparse(moe={"d_expert": F // G})
  upcycle(source, config, tmp_path / "moe", Recipe(G))
  want, _ = gradients(source)
  got, counts = gradients(tmp_path / "moe")
  assert counts.shape == (L, 8)
  for layer in range(L):
    for mine, theirs, factor in (
      ("w_gate_EDF", "w_gate_DF", 1),
      ("w_up_EDF", "w_up_DF", 1),
      ("w_down_EFD", "w_down_FD", G),
    ):
      stack = got[at(layer, f"moe/{mine}")]
      reached = np.abs(stack).max((1, 2)) > 0
      np.testing.assert_array_equal(reached, np.asarray(counts[layer]) > 0)
      parts = [stack[s::G].sum(0) * factor for s in range(G)]
      total = np.concatenate(parts, axis=0 if mine == "w_down_EFD" else 1)
      whole = want[at(layer, f"mlp/{theirs}")]
      assert np.abs(total - whole).max() < 1e-5 * np.abs(whole).max()
  other = got[at(0, "attention/w_q_DNH")] - want[at(0, "attention/w_q_DNH")]
  scale = np.abs(want[at(0, "attention/w_q_DNH")]).max()
  assert np.abs(other).max() < 1e-5 * scale
