# SPDX-License-Identifier: Apache-2.0
"""Rows go to their experts and back, each once, or are counted as dropped."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moejax.config import Config
from moejax.models import Rows, build, init_variables
from moejax.parallel import build_on_mesh, make_mesh
from moejax.parallel.exchange import AXIS, Plan, admitted, receive, send
from moejax.routing import Routing
from moejax.step import batch_sums
from tests.invariance.cells import Cell, E, batch, program, variables

P, A, D = 4, 24, 5
SPEC = PartitionSpec(AXIS)


def loads(kind):
  """Rows of each expert on each device, [P, E]; some rows are of none."""
  rng = np.random.default_rng(0)
  sizes = {
    "random": rng.multinomial(A - 3, np.full(E, 1 / E), P),
    "one expert": np.eye(E, dtype=int)[[5] * P] * A,
    "one device": rng.multinomial(A, [0, 0, 0.3, 0.7, 0, 0, 0, 0], P),
    "nothing": np.zeros((P, E), int),
    "only from one": np.eye(P, dtype=int)[:, :1] * rng.integers(0, 3, E),
  }[kind]
  return sizes.astype(np.int32)


@functools.cache
def mesh():
  return jax.make_mesh(
    (P,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:P]
  )


def on_devices(function, *args):
  """Each device calls it with entry `p` of the arguments."""

  def body(*args):
    out = function(*(x[0] for x in args))
    return jax.tree.map(lambda x: x[None], out)

  return jax.jit(
    jax.shard_map(
      body, mesh=mesh(), in_specs=SPEC, out_specs=SPEC, check_vma=False
    )
  )(*args)


@pytest.mark.parametrize(
  "kind", ["random", "one expert", "one device", "nothing", "only from one"]
)
def test_rows_arrive_sorted_and_come_back(kind):
  sizes = loads(kind)
  rows = np.random.default_rng(1).standard_normal((P, A, D)).astype(np.float32)

  def there_and_back(sizes_E, rows_AD):
    plan = Plan.make(sizes_E, P, A, P * A, native=False)
    got, pull = jax.vjp(functools.partial(send, plan), rows_AD)
    back, pull_back = jax.vjp(functools.partial(receive, plan), 2 * got)
    return got, plan.received_E, back, pull(3 * got)[0], pull_back(rows_AD)[0]

  got, received, back, d_rows, d_got = on_devices(there_and_back, sizes, rows)
  here = E // P
  ends = np.cumsum(sizes, axis=1)
  for p in range(P):
    want = [
      rows[q, ends[q, e] - sizes[q, e] : ends[q, e]]
      for e in range(p * here, (p + 1) * here)
      for q in range(P)
    ]
    want = np.concatenate(want)
    np.testing.assert_array_equal(got[p, : len(want)], want)
    assert not np.any(got[p, len(want) :])
    assert received[p].sum() == len(want)
    sent = np.where(np.arange(A)[:, None] < ends[p, -1], rows[p], 0)
    np.testing.assert_array_equal(back[p], 2 * sent)
    # Each is the other's transpose.
    np.testing.assert_array_equal(d_rows[p], 3 * sent)
    np.testing.assert_array_equal(d_got[p], got[p])


def test_only_as_many_are_admitted_as_there_is_room_for():
  sizes = loads("random")
  room = 20
  kept = np.asarray(
    on_devices(lambda sizes_E: admitted(sizes_E, P, room), sizes)
  )
  assert (kept <= sizes).all()
  wanted = sizes.sum(0).reshape(P, -1).sum(1)
  landed = kept.sum(0).reshape(P, -1).sum(1)
  np.testing.assert_array_equal(landed, np.minimum(wanted, room))


PROBED = 16  # tokens that a router is tried on before it trains


def apply_on(parallel, router, dropless=False):
  config = Cell(dispatch="ragged").config().to_dict()
  config["model"]["moe"]["router"] = router
  config["model"]["pattern"] = ("attention/moe",)
  config = Config.from_dict(config | {"parallel": parallel})
  where = make_mesh(
    config.parallel, jax.devices()[: config.parallel.num_devices]
  )
  given = init_variables(build(config.model), jax.random.key(1))
  sums, stats = jax.jit(
    lambda v, b: batch_sums(
      config, build_on_mesh(config, where, dropless=dropless), v, b, None
    )
  )(given, batch())
  return sums, jax.device_get(stats)


def test_what_there_is_no_room_for_is_counted():
  router = "tests.parallel.test_expert_parallel.ends(k=2)"
  _, stats = apply_on({"expert": 4, "receive_factor": 1.0}, router)
  tokens = stats.tokens_B.sum()
  # All rows go to two of four devices, each with room for its own share.
  assert stats.dropped_B.sum() > 0.4 * 2 * tokens
  landed = stats.count_BE.sum((1, 2)) + stats.dropped_B.sum(1)
  np.testing.assert_array_equal(landed, 2 * stats.tokens_B.sum(1))
  wanted = stats.wanted_BE.sum((1, 2))
  np.testing.assert_array_equal(wanted, 2 * stats.tokens_B.sum(1))
  # A balancing bias follows what was chosen: who is full is not idle.
  _, alone = apply_on({}, router)
  np.testing.assert_array_equal(stats.chosen_BE.sum(1), alone.chosen_BE.sum(1))
  np.testing.assert_array_equal(alone.chosen_BE, alone.count_BE)


def test_evaluation_has_room_for_all():
  """A validation loss is not to depend on the mesh."""
  router = "tests.parallel.test_expert_parallel.ends(k=2)"
  full = {"expert": 4, "receive_factor": 1.0}
  sums, stats = apply_on(full, router, dropless=True)
  want, _ = apply_on({}, router)
  assert not stats.dropped_B.any()
  np.testing.assert_allclose(sums.xent, want.xent, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.0, 4.0])
def test_with_room_for_all_nothing_is_dropped(factor):
  router = "tests.parallel.test_expert_parallel.ends(k=2)"
  sums, stats = apply_on({"expert": 4, "receive_factor": factor}, router)
  want, want_stats = apply_on({}, router)
  assert stats.dropped_B.sum() == 0
  np.testing.assert_array_equal(stats.count_BE, want_stats.count_BE)
  np.testing.assert_allclose(sums.total, want.total, rtol=1e-6)


def test_a_token_that_names_an_expert_twice_loses_nothing_unseen():
  """More rows than room for distinct experts: dropped ones are counted."""
  router = "tests.parallel.test_expert_parallel.twice(k=4)"
  _, stats = apply_on({"expert": 4}, router)
  total = stats.count_BE.sum() + stats.dropped_B.sum()
  assert total == 4 * stats.tokens_B.sum()
  assert stats.dropped_B.sum() > 0


def twice(logits_TE, mask_T, *, k, rng=None):
  """One expert of one device, k times, where the probe does not see it."""
  tokens = logits_TE.shape[0]
  experts = range(k) if tokens <= PROBED else [0] * k
  return same_for_all(list(experts), logits_TE, mask_T)


def ends(logits_TE, mask_T, *, k, rng=None):
  """The first and the last expert."""
  return same_for_all([0, E - 1], logits_TE, mask_T)


def same_for_all(experts, logits_TE, mask_T):
  T = logits_TE.shape[0]
  expert_TX = jnp.tile(jnp.asarray(experts)[None], (T, 1))
  weight_TX = jnp.full(expert_TX.shape, 1 / len(experts))
  return Routing.from_token_choice(expert_TX, weight_TX, logits_TE, mask_T)


def collectives(text):
  """(kind, elements of the result) of each collective of a program."""
  found = []
  for line in text.splitlines():
    match = re.search(
      r"= (\(.*?\)|\S+) (all-gather|all-to-all|reduce-scatter)", line
    )
    if match:
      sizes = [
        int(np.prod([int(n) for n in dims.split(",") if n]))
        for dims in re.findall(r"\[([\d,]*)\]", match[1])
      ]
      found.append((match[2], sum(sizes)))
  return found


def test_no_device_gathers_all_tokens():
  """Rows travel by all-to-all; what is gathered is weights and counts."""
  cell = Cell("ep8", dispatch="ragged", router="top_k(k=2)")
  given, rows = variables(cell.router), batch()
  text = program(cell).lower(given, rows).compile().as_text()
  found = collectives(text)
  tokens = rows["tokens"].size * 32  # d_model
  largest = max(x.size for x in jax.tree.leaves(given["params"]))
  assert any(kind == "all-to-all" for kind, _ in found)
  gathered = [size for kind, size in found if kind == "all-gather"]
  assert gathered
  assert max(gathered) <= largest < tokens
  # The other form does gather them, so this would be seen.
  other = dataclasses.replace(cell, exchange="all_gather")
  text = program(other).lower(given, rows).compile().as_text()
  gathered = [size for kind, size in collectives(text) if kind == "all-gather"]
  assert max(gathered) >= tokens


def test_remat_need_not_exchange_again():
  """Rows each way, forward and backward; `full` sends them once more."""
  router = "top_k(k=2)"
  given, rows = variables(router), batch()

  def exchanged(remat):
    cell = Cell("ep8", dispatch="ragged", remat=remat, router=router)
    text = program(cell).lower(given, rows).compile().as_text()
    return sorted(x for kind, x in collectives(text) if kind == "all-to-all")

  least = exchanged("none")
  assert exchanged("exchange") == least
  assert exchanged("experts") == least
  assert sum(exchanged("full")) > 1.2 * sum(least)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_exchange_ragged_rows(platform):
  """Lowered for them on this CPU: rows go as they are, without boxes."""
  values = Cell("ep8", dispatch="ragged").config().to_dict()
  values["model"]["attention"] = "plain"
  values["model"]["moe"]["matmul"] = "reference"
  config = Config.from_dict(values)
  where = make_mesh(config.parallel)
  model = build_on_mesh(config, where, "tpu" if platform == "tpu" else "gpu")
  assert model.backends.dispatch.native
  given, rows = variables(Cell().router), batch()

  def loss(given, rows):
    out = model.apply(
      given, rows["tokens"], Rows(rows["segment_ids"], rows["positions"])
    )
    return out.hidden_BTD.sum()

  lowered = (
    jax.jit(jax.grad(loss, allow_int=True))
    .trace(given, rows)
    .lower(lowering_platforms=(platform,))
  )
  # There and back, forward and backward, of attention and MLP experts.
  assert lowered.as_text().count("ragged_all_to_all") >= 4
