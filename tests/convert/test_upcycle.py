# SPDX-License-Identifier: Apache-2.0
"""Dense runs as mixtures of experts: the same function where it is promised."""

import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from moejax import runs
from moejax.checkpoint import CheckpointReader
from moejax.checkpoint.leaves import named_leaves
from moejax.config import Config
from moejax.convert.from_hf import from_hf
from moejax.convert.to_hf import to_hf
from moejax.convert.upcycle import Recipe, upcycle
from moejax.errors import CheckpointError, ConfigError, DataError
from moejax.models import Rows, build, init_variables
from moejax.resume import refuse_converted
from moejax.step import init_state
from tests.convert import families as hf
from tests.convert.hub_folder import write
from tests.convert.test_round_trip import stop_after
from tests.fresh_run import fresh_run
from tests.small_run import make_place, moejax

L, D, F, V = 4, 24, 32, 259
B, T = 4, 64
RENORMALIZED = "top_k(k=2, renormalize=True)"
PLAIN = Recipe()


def config_of(pattern, seed=0, moe=None, **model):
  """A small model; sizes differ, so that no transpose goes unnoticed."""
  sizes = {
    "vocab_size": V, "d_model": D, "num_layers": L, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 10, "d_mlp": F, "dtype": "float32",
    "init_std": 0.2, "scan_layers": False, "pattern": pattern,
  }  # fmt: skip
  moe = {"num_experts": 8, "d_expert": F, "router": RENORMALIZED} | (moe or {})
  return Config.from_dict({"seed": seed, "model": sizes | {"moe": moe} | model})


def sparse(pattern=("attention/moe",), **options):
  return config_of(pattern, **options)


def dense_run(
  folder, pattern=("attention/mlp",), dtype=np.float32, **model
):  # fmt: skip
  """A run in which no weight is as it is drawn, gains included."""
  config = config_of(pattern, **model)
  shapes = jax.eval_shape(
    lambda: init_variables(build(config.model), jax.random.key(0))
  )
  rng = np.random.default_rng(1)
  draw = lambda x: (rng.normal(0, 0.3, x.shape) + (x.ndim == 1)).astype(dtype)
  return fresh_run(folder, config, jax.tree.map(draw, shapes))


def logits(folder):
  run = runs.load_run(folder)
  tokens = np.random.default_rng(0).integers(0, V, (B, T))
  rows = Rows(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)))
  hidden = run.model.apply(run.variables, tokens, rows).hidden_BTD
  return np.asarray(run.model.apply(run.variables, hidden, method="logits"))


def error(folder, source):
  """Relative, of the logits."""
  got, want = logits(folder), logits(source)
  return np.abs(got - want).max() / np.abs(want).max()


def leaves(folder):
  """Arrays of a run, each without the parts of its name that layouts set."""
  variables = runs.load_run(folder).variables
  return {k: np.asarray(v) for k, v in named_leaves(variables).items()}


def at(layer, name):
  return f"params/repeats_{layer}/block_0/{name}"


def test_the_mlps_matter(tmp_path):
  """Else equal logits would say nothing."""
  source = dense_run(tmp_path / "dense")
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
  granularity, num_experts, router, factor, tmp_path, capsys
):
  source = dense_run(tmp_path / "dense")
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
@pytest.mark.parametrize("granularity", [1, 2])
def test_layers_lie_as_they_like(granularity, theirs, ours, tmp_path):
  source = dense_run(tmp_path / "dense", **theirs)
  config = sparse(moe={"d_expert": F // granularity}, **ours)
  upcycle(source, config, tmp_path / "moe", Recipe(granularity))
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
  granularity, router, why, tmp_path, capsys
):
  source = dense_run(tmp_path / "dense")
  config = sparse(moe={"router": router, "d_expert": F // granularity})
  upcycle(source, config, tmp_path / "moe", Recipe(granularity))
  assert error(tmp_path / "moe", source) > 0.01
  (line,) = [x for x in capsys.readouterr().out.splitlines() if "note:" in x]
  assert line.startswith("note: logits are not the dense model's: ")
  assert re.search(why, line)


def test_noise_that_parts_slices_is_said(tmp_path, capsys):
  source = dense_run(tmp_path / "dense")
  router = "top_k(k=2, renormalize=True, jitter=0.1)"
  config = sparse(moe={"router": router, "d_expert": F // 2})
  upcycle(source, config, tmp_path / "moe", Recipe(granularity=2))
  out = capsys.readouterr().out
  assert "note: not so in training: the router's noise breaks the ties" in out
  assert error(tmp_path / "moe", source) < 1e-5


def test_every_weight_is_a_copy_or_drawn(tmp_path):
  source = dense_run(tmp_path / "dense", scan_layers=True)
  config = sparse(("attention/mlp", "attention/moe"), seed=5)
  upcycle(source, config, tmp_path / "moe", PLAIN)
  dense, new = leaves(source), leaves(tmp_path / "moe")
  fresh = init_state(config, build(config.model)).params
  for name in ("w_embed_VD", "w_output_VD", "final_norm/scale"):
    np.testing.assert_array_equal(
      new[f"params/{name}"], dense[f"params/{name}"]
    )
  unseen = {name for name in new if "repeats" in name}
  for layer in range(L):
    mine = f"params/repeats_{layer // 2}/block_{layer % 2}/"
    theirs = "params/repeats/block_0/"
    for name in (n.removeprefix(mine) for n in new if n.startswith(mine)):
      unseen.remove(mine + name)
      if name == "moe/w_router_DE":
        want = fresh[f"repeats_{layer // 2}"]["block_1"]["moe"]["w_router_DE"]
      elif name.startswith("moe/"):
        of_mlp = name[4:].replace("_EDF", "_DF").replace("_EFD", "_FD")
        want = dense[f"{theirs}mlp/{of_mlp}"][layer]
        want = np.broadcast_to(want, (8, *want.shape))
      else:
        want = dense[theirs + name][layer]
      np.testing.assert_array_equal(new[mine + name], want, err_msg=name)
  assert not unseen


def test_experts_of_a_group_are_the_slices(tmp_path):
  source = dense_run(tmp_path / "dense")
  moe = {"d_expert": F // 2, "num_experts": 6}
  upcycle(source, sparse(moe=moe), tmp_path / "moe", Recipe(granularity=2))
  dense, new = leaves(source), leaves(tmp_path / "moe")
  for e in range(6):
    part = slice(0, F // 2) if e % 2 == 0 else slice(F // 2, F)
    for name, want in (
      ("w_gate_EDF", dense[at(1, "mlp/w_gate_DF")][:, part]),
      ("w_up_EDF", dense[at(1, "mlp/w_up_DF")][:, part]),
      ("w_down_EFD", 2 * dense[at(1, "mlp/w_down_FD")][part]),
    ):
      np.testing.assert_array_equal(new[at(1, f"moe/{name}")][e], want)
  w_DE = new[at(1, "moe/w_router_DE")]
  np.testing.assert_array_equal(w_DE[:, ::2], w_DE[:, 1::2])
  assert len(np.unique(w_DE[0])) == 3


@pytest.mark.parametrize("share", [0.5, 0.1, 1.0])
def test_the_share_of_noise(share, tmp_path, capsys):
  source = dense_run(tmp_path / "dense")
  recipe = Recipe(granularity=2, noise=share, noise_std=0.05)
  config = sparse(moe={"d_expert": F // 2})
  upcycle(source, config, tmp_path / "moe", recipe)
  assert f"note: {share:.0%} of the experts' entries" in capsys.readouterr().out
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


def test_the_seed_decides(tmp_path):
  source = dense_run(tmp_path / "dense")
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


def test_a_bias_and_a_balancing_bias_begin_at_zero(tmp_path):
  source = dense_run(tmp_path / "dense")
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
def test_gradients_of_experts_sum_to_the_dense_ones(granularity, tmp_path):
  """By the chain rule: weights sum to 1, and the copies are equal."""
  G = granularity
  source = dense_run(tmp_path / "dense")
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
      dense = want[at(layer, f"mlp/{theirs}")]
      assert np.abs(total - dense).max() < 1e-5 * np.abs(dense).max()
  other = got[at(0, "attention/w_q_DNH")] - want[at(0, "attention/w_q_DNH")]
  scale = np.abs(want[at(0, "attention/w_q_DNH")]).max()
  assert np.abs(other).max() < 1e-5 * scale


REFUSED = [
  ({}, {"d_model": 32}, 1, "is not the model of .*: model.d_model: 24 -> 32;"),
  ({}, {"vocab_size": 300}, 1, "model.vocab_size: 259 -> 300"),
  ({}, {"num_kv_heads": 4}, 1, "model.num_kv_heads: 2 -> 4"),
  ({}, {"norm": "layer"}, 1, "model.norm: 'rms' -> 'layer'"),
  ({}, {"tie_embeddings": True}, 1, "model.tie_embeddings: False -> True"),
  ({}, {"qk_norm": "none"}, 1, "model.qk_norm: 'full' -> 'none'"),
  ({}, {"rope_theta": 7.0}, 1, "model.rope_theta: 10000.0 -> 7.0"),
  ({}, {"num_layers": 6}, 1, "model.num_layers: 4 -> 6"),
  (
    {},
    {"pattern": ("attention/mlp", "attention/moe"), "d_mlp": 64},
    1,
    "model.d_mlp: 32 -> 64",
  ),
  (
    {"qk_norm": "none"},
    {"pattern": ("attention/moe", "shared_kv/moe"), "qk_norm": "none"},
    1,
    "layer 1 is shared_kv/moe, that of .* attention/mlp; use attention/moe",
  ),
  ({}, {"pattern": ("attention/mlp",)}, 1, "no MoE layer; set model.pattern"),
  (
    {"pattern": ("attention/mlp", "attention/moe")},
    {},
    1,
    "is not dense: layer 1 is attention/moe; .* all /mlp",
  ),
  (
    {},
    {"moe": {"d_expert": 20}},
    1,
    "d_expert=20 times .*=32; use d_expert=32",
  ),
  ({}, {}, 2, "d_expert=32 times --granularity=2 is .*=32; use d_expert=16"),
  ({}, {}, 3, "--granularity=3 .* use a granularity that divides 32"),
  (
    {},
    {"moe": {"d_expert": 8, "num_experts": 10}},
    4,
    "num_experts=10 is not a multiple of --granularity=4; use 12",
  ),
  ({}, {"moe": {"num_shared_experts": 1}}, 1, "num_shared_experts=1.*use 0"),
  (
    {},
    {"moe": {"router": "top_k(k=1, renormalize=True)"}},
    1,
    "renormalize=True with k=1",
  ),
]


@pytest.mark.parametrize("theirs, ours, granularity, message", REFUSED)
def test_what_does_not_fit_is_refused(
  theirs, ours, granularity, message, tmp_path
):
  source = dense_run(tmp_path / "dense", **theirs)
  with pytest.raises(ConfigError, match=message) as e:
    upcycle(source, sparse(**ours), tmp_path / "moe", Recipe(granularity))
  assert "\n" not in str(e.value)
  assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
  "options, message",
  [
    ({"granularity": 0}, "--granularity=0 must be positive"),
    ({"noise": 1.5}, "--noise=1.5 is a share"),
    ({"noise": -0.1}, "--noise=-0.1 is a share"),
    ({"noise_std": 0.0}, "--noise-std=0.0 must be positive"),
  ],
)
def test_impossible_recipes(options, message):
  with pytest.raises(ConfigError, match=message):
    Recipe(**options)


def test_folders_that_are_not_there_or_taken(tmp_path):
  with pytest.raises(DataError, match="nowhere is not the folder of a run"):
    upcycle(tmp_path / "nowhere", sparse(), tmp_path / "moe", PLAIN)
  source = dense_run(tmp_path / "dense")
  with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
    upcycle(source, sparse(), tmp_path / "moe", PLAIN, step=7)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").touch()
  with pytest.raises(
    ConfigError, match="is not empty .it has thesis.tex.; use"
  ):
    upcycle(source, sparse(), tmp_path / "full", PLAIN)
  with pytest.raises(
    ConfigError, match="holds another checkpoint; use another"
  ):
    upcycle(source, sparse(), source, PLAIN)


def test_another_tokenizer_is_not_taken_over(tmp_path):
  source = dense_run(tmp_path / "dense")
  for file in source.glob("tokenizer*"):
    file.unlink()
  write(tmp_path / "hub", hf.FAMILIES[0])
  shutil.copy(tmp_path / "hub" / "tokenizer.json", source)
  with pytest.raises(CheckpointError, match="is not the one step 3 was"):
    upcycle(source, sparse(), tmp_path / "moe", PLAIN)
  assert not (tmp_path / "moe").exists()


def test_a_stopped_one_goes_on(tmp_path, monkeypatch, capsys):
  source = dense_run(tmp_path / "dense")
  recipe = Recipe(noise=0.5)
  upcycle(source, sparse(), tmp_path / "whole", recipe)
  with monkeypatch.context() as m:
    stop_after(m, 20)
    with pytest.raises(KeyboardInterrupt):
      upcycle(source, sparse(), tmp_path / "moe", recipe)
  assert not (tmp_path / "moe" / "config.json").exists()
  with pytest.raises(CheckpointError, match="holds unfinished work on"):
    upcycle(source, sparse(), tmp_path / "moe", PLAIN)
  with monkeypatch.context() as m:
    done = stop_after(m, 1000)
    upcycle(source, sparse(), tmp_path / "moe", recipe)
  one, two = leaves(tmp_path / "moe"), leaves(tmp_path / "whole")
  assert len(done) == len(one) - 20
  jax.tree.map(np.testing.assert_array_equal, one, two)
  upcycle(source, sparse(), tmp_path / "moe", recipe)
  assert "holds this checkpoint already" in capsys.readouterr().out


def test_it_says_where_it_comes_from(tmp_path):
  source = dense_run(tmp_path / "dense")
  recipe = Recipe(noise=0.25, noise_std=0.1)
  upcycle(source, sparse(seed=9), tmp_path / "moe", recipe)
  meta = CheckpointReader(tmp_path / "moe" / "checkpoints").read_meta()
  assert meta["upcycled_from"] == {
    "run": str(source), "step": 3, "granularity": 1, "noise": 0.25,
    "noise_std": 0.1, "seed": 9,
  }  # fmt: skip
  with pytest.raises(CheckpointError, match="holds converted weights, not a"):
    refuse_converted(tmp_path / "moe")


def test_the_hub_takes_it(tmp_path):
  """And gives the same model back."""
  source = dense_run(tmp_path / "dense", qk_norm="none")
  upcycle(source, sparse(qk_norm="none"), tmp_path / "moe", PLAIN)
  to_hf(tmp_path / "moe", tmp_path / "hub", family="mixtral")
  from_hf(tmp_path / "hub", tmp_path / "again")
  assert error(tmp_path / "again", source) < 1e-5


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
  """Train densely, upcycle, the same validation loss, train on."""
  place = make_place(tmp_path)

  def run(*args):
    done = moejax(place, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout

  file, steps = "--config=config.py", "--config.train.num_steps=20"
  short = "--config.optimizer.schedule.decay=5.0"
  dense = ("--config.model.pattern=attention/mlp", "--config.model.d_mlp=32")
  run("train", file, "--workdir=dense", steps, short, *dense)
  experts = "--config.model.moe.d_expert=16"
  router = "--config.model.moe.router=top_k(k=2, renormalize=True)"
  out = run(
    "convert", "upcycle", "dense", file, experts, router, "--out=moe",
    "--granularity=2",
  )  # fmt: skip
  assert "logits are the dense model's" in out
  one, two = (
    json.loads(run("eval", name, "--json").splitlines()[-1])["xent"]
    for name in ("dense", "moe")
  )
  assert abs(two / one - 1) < 1e-5
  assert run("generate", "moe", "--prompt=the", "--max-tokens=4")
  init = "--config.train.init_from=moe"
  run("train", file, "--workdir=on", steps, short, router, init)
  lines = (place / "on" / "metrics.jsonl").read_text().splitlines()
  losses = [x["loss/xent"] for x in map(json.loads, lines) if "loss/xent" in x]
  assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5])
  before, after = leaves(place / "moe"), leaves(place / "on")
  name = at(0, "moe/w_up_EDF")
  moved = np.abs(after[name.replace("repeats_0", "repeats")][0] - before[name])
  assert (moved.max((1, 2)) > 0).all()
  done = moejax(place, "train", file, "--workdir=moe", router)
  assert done.returncode == 2 and "holds converted weights" in done.stderr
  done = moejax(place, "convert", "upcycle", "dense", file, "--out=new")
  assert done.returncode == 2
  assert done.stderr.startswith("moejax convert: model.moe.d_expert=16 times")
