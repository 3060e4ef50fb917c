# SPDX-License-Identifier: Apache-2.0
"""What routers chose, token by token: right, in order, on any mesh."""

import jax
import numpy as np
import pytest

from moejax.config import Config
from moejax.models import Rows, build, init_variables, watched_routers
from moejax.parallel import build_on_mesh, make_mesh
from tests.invariance.cells import EXPERT_CHOICE, MESHES, B, T, V, batch

# Attention experts, a dense prefix layer, a MoE prefix layer, MoE every other.
STACKS = {
  "experts of both kinds": {"pattern": ("moa/moe",), "num_layers": 2},
  "some layers": {
    "prefix": ("attention/mlp", "moa/moe"),
    "pattern": ("moa/mlp", "attention/moe"), "num_layers": 6,
  },
}  # fmt: skip


def config_of(stack, mesh="one", scan_layers=True, **moe):
  return Config.from_dict({
    "model": {
      "vocab_size": V, "d_model": 32, "num_heads": 4, "num_kv_heads": 2,
      "head_dim": 8, "qk_norm": "none", "d_mlp": 24, "dtype": "float32",
      "init_std": 0.1, "scan_layers": scan_layers,
      "moe": {"num_experts": 8, "d_expert": 20, "router": "top_k(k=2)"} | moe,
    } | stack,
    "parallel": MESHES[mesh],
  })  # fmt: skip


def watch(config):
  """(what was watched, the stats, the weights of routers in order)."""
  devices = jax.devices()[: config.parallel.num_devices]
  model = build_on_mesh(config, make_mesh(config.parallel, devices))
  given = batch()
  rows = Rows(given["segment_ids"], given["positions"])
  variables = init_variables(build(config.model), jax.random.key(0))

  @jax.jit
  def forward(variables, tokens_BT, rows):
    output, state = model.apply(variables, tokens_BT, rows, mutable=["routing"])
    return watched_routers(config.model, state["routing"]), output.stats

  watched, stats = forward(variables, given["tokens"], rows)
  return jax.device_get((watched, stats, variables["params"]))


def router_weights(config, params):
  """[L, D, E] of all layers in order, however they are stacked."""
  found = []
  stack = list(config.model.prefix) + list(config.model.pattern) * (
    config.model.num_repeats
  )
  for i, layer in enumerate(stack):
    place = i - len(config.model.prefix)
    r, j = divmod(place, len(config.model.pattern))
    if place < 0:
      block, index = params[f"prefix_{i}"], ...
    elif config.model.scan_layers:
      block, index = params["repeats"][f"block_{j}"], r
    else:
      block, index = params[f"repeats_{r}"][f"block_{j}"], ...
    if layer.startswith("moa"):
      found.append(block["attention"]["w_router_DE"][index])
    if layer.endswith("moe"):
      found.append(block["moe"]["w_router_DE"][index])
  return np.stack(found).astype(np.float64)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_choices_are_those_of_the_logits_in_float64(name, scan_layers):
  """A loop over tokens, from what the router saw and its weights."""
  config = config_of(STACKS[name], scan_layers=scan_layers)
  watched, stats, params = watch(config)
  weights = router_weights(config, params)
  L, E = len(weights), 8
  assert watched.x_BTD.shape == (L, B, T, 32)
  mask = np.asarray(batch()["segment_ids"]) > 0
  assert not mask.all()
  logits = np.einsum("lbtd,lde->lbte", np.float64(watched.x_BTD), weights)
  choices, close = watched.choices, 0
  for place in np.ndindex(L, B, T):
    if not mask[place[1:]]:
      assert not choices.chosen_BTE[place].any()
      assert choices.top_BT[place] == E and choices.entropy_BT[place] == 0
      continue
    order = np.argsort(-logits[place])
    prob = np.exp(logits[place] - logits[place].max())
    prob /= prob.sum()
    entropy = -(prob * np.log(prob)).sum() / np.log(E)
    assert choices.entropy_BT[place] == pytest.approx(entropy, rel=1e-5)
    # A difference that float32 cannot hold decides nothing.
    if np.abs(np.diff(logits[place][order[:3]])).min() < 1e-5:
      close += 1
      continue
    assert set(np.flatnonzero(choices.chosen_BTE[place])) == set(order[:2])
    assert choices.top_BT[place] == order[0]
  assert close < 0.01 * L * mask.sum()
  np.testing.assert_array_equal(choices.chosen_BTE.sum(2), stats.count_BE)
  np.testing.assert_allclose(
    choices.entropy_BT.sum(2) * np.log(E), stats.entropy_B, rtol=1e-5
  )


@pytest.mark.parametrize(
  "router, most",
  [
    (EXPERT_CHOICE, 8),
    ("top_p(p=0.4, k=3)", 3),
    ("null_experts(k=2, num_null=6)", 2),
  ],
)
def test_routers_without_a_number_of_experts_a_token(router, most):
  """Experts whom nobody needs, and null experts, are not chosen."""
  stack = {"pattern": ("attention/moe",), "num_layers": 2}
  watched, stats, _ = watch(config_of(stack, router=router))
  chosen = watched.choices.chosen_BTE
  np.testing.assert_array_equal(chosen.sum(2), stats.count_BE)
  each = chosen.sum(-1)
  assert each.min() == 0 and 1 < each.max() <= most
  nowhere = each == 0
  np.testing.assert_array_equal(watched.choices.top_BT == 8, nowhere)
  top = watched.choices.top_BT[~nowhere]
  assert chosen[~nowhere][np.arange(len(top)), top].all()
  assert 0 < watched.choices.entropy_BT.max() < 1


@pytest.mark.parametrize("mesh", ["dp2-ep4", "fsdp2-ep2-tp2", "sequence2"])
def test_a_mesh_chooses_as_one_device_does(mesh):
  stack = STACKS["experts of both kinds"]
  got, _, _ = watch(config_of(stack, mesh))
  want, _, _ = watch(config_of(stack))
  np.testing.assert_array_equal(got.choices.chosen_BTE, want.choices.chosen_BTE)
  np.testing.assert_array_equal(got.choices.top_BT, want.choices.top_BT)
  for have, wish in (
    (got.x_BTD, want.x_BTD),
    (got.choices.entropy_BT, want.choices.entropy_BT),
  ):
    assert np.linalg.norm(have - wish) < 1e-5 * np.linalg.norm(wish)


def test_nothing_is_watched_unless_it_is_wanted():
  config = config_of(STACKS["some layers"])
  model, given = build(config.model), batch()
  variables = init_variables(model, jax.random.key(0))
  assert set(variables) == {"params"}
  rows = Rows(given["segment_ids"], given["positions"])

  def results(mutable):
    forward = lambda v, t: model.apply(v, t, rows, mutable=mutable)
    return jax.make_jaxpr(forward)(variables, given["tokens"])

  plain, watched = results([]), results(["routing"])
  # Only what asks for them computes the tokens' own masks.
  mask = f"bool[{B * T},8]"
  assert mask not in str(plain) and mask in str(watched)
