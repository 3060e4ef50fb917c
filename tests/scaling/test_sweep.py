# SPDX-License-Identifier: Apache-2.0
"""The runs of a sweep: sizes of a family, tokens of a budget."""

import math
from pathlib import Path

import pytest

from moejax import cli
from moejax.errors import ConfigError, UserError
from moejax.models import count
from moejax.scaling import plan_points, sweep_of
from moejax.scaling.sizes import find_size, params_of
from moejax.scaling.sweep import _names

CONFIGS = Path(__file__).parents[2] / "configs"
SYSTEMS = sorted(path.stem for path in CONFIGS.glob("*.py"))
TINY = str(CONFIGS / "tiny.py")
ONE_PHASE = "--config.train.phases=[]"
SIZES = [2e5, 4e5, 8e5, 1.6e6, 3.2e6]


def read(name, *extra):
  return cli.parse_config(str(CONFIGS / f"{name}.py"), list(extra))


def test_a_points_numbers_counted_by_hand():
  """One size of tiny.py: 3 layers of 104, 3 heads of 32, 8 experts top-2."""
  (point,) = plan_points(read("tiny"), [1e13], [4e5])
  D, L, N, H, E, F, k, V, T = 104, 3, 3, 32, 8, 104, 2, 320, 256
  assert {
    "model.d_model": D, "model.num_layers": L, "model.num_heads": N,
    "model.num_kv_heads": N, "model.moe.d_expert": F,
  }.items() <= point.options.items()  # fmt: skip
  # Q, K, V, output; router; three matrices of each expert that is visited.
  multiplied = L * (4 * D * N * H + D * E + k * 3 * D * F) + V * D
  gains = L * (2 * D + 2 * N * H) + D  # two norms a layer, QK-norms, the last
  assert point.params == point.active_params == multiplied + V * D + gains
  # 2 FLOPs a weight; scores and values of T / 2 keys; backward is twice that.
  per_token = 3 * (2 * multiplied + L * 2 * 2 * N * H * T / 2)
  batch = 8 * T
  assert point.steps == round(1e13 / per_token / batch)
  assert point.tokens == point.steps * batch
  assert point.flops == pytest.approx(per_token * point.tokens, rel=1e-12)
  assert point.six_nd == 6 * point.params * point.tokens
  assert point.hunyuan_large == (
    9.59 * point.params * point.tokens + 2.3e8 * point.tokens
  )


def test_every_size_meets_every_budget():
  points = plan_points(read("tiny"), [3e13, 1e13], SIZES)
  assert [p.budget for p in points] == [1e13] * 5 + [3e13] * 5
  for point, wanted in zip(points, 2 * SIZES):
    assert point.params == pytest.approx(wanted, rel=0.1)
    assert point.params == count(point.config.model).num_active_params
    # Half a step of the whole number of them.
    assert abs(point.flops / point.budget - 1) <= 0.5 / point.steps + 1e-9
  assert len(sweep_of(points)) == 10


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_family_keeps_what_it_says_it_keeps(name):
  config = read(name)
  old = config.model
  wanted = [f * params_of(old, "active") for f in (0.01, 0.1, 0.5, 1.0)]
  if name == "tiny":  # 2000 parameters would be none at all
    wanted = SIZES
  sizes = [find_size(config, x, "active") for x in wanted]
  for x, size in zip(wanted, sizes):
    new = size.model
    assert size.params == pytest.approx(x, rel=0.2)
    assert size.params == count(new).num_active_params
    for kept in ("vocab_size", "head_dim", "prefix", "pattern", "qk_norm"):
      assert getattr(new, kept) == getattr(old, kept)
    for kept in ("num_experts", "router", "num_shared_experts"):
      assert getattr(new.moe, kept) == getattr(old.moe, kept)
    assert new.num_heads / new.num_kv_heads == old.num_heads / old.num_kv_heads
    shape = new.d_model / new.num_repeats / (old.d_model / old.num_repeats)
    assert abs(math.log(shape)) < 0.35
    assert size.shape == pytest.approx(shape, rel=1e-12)
    assert new.d_model / old.d_model == pytest.approx(
      new.moe.d_expert / old.moe.d_expert, rel=0.1
    )
  assert [s.model.d_model for s in sizes] == sorted(
    {s.model.d_model for s in sizes}
  )


def test_the_whole_size_is_the_config_itself():
  config = read("olmoe_1b_7b")
  size = find_size(config, params_of(config.model, "active"), "active")
  assert size.model == config.model


def test_latents_scale_too():
  config = read("deepseek_v3")
  model = find_size(config, 1e9, "active").model
  factor = model.d_model / config.model.d_model
  for name in ("q_rank", "kv_rank"):
    old, new = getattr(config.model.mla, name), getattr(model.mla, name)
    assert new / old == pytest.approx(factor, rel=0.05)
  assert model.mla.nope_dim == config.model.mla.nope_dim


def test_non_embedding_counts_leave_the_tables_out():
  config = read("tiny")
  tied = read("tiny", "--config.model.tie_embeddings=true")
  table = 320 * 128
  for each, tables in ((config, 2), (tied, 1)):
    active = params_of(each.model, "active")
    assert active - params_of(each.model, "non-embedding") == tables * table
  (point,) = plan_points(config, [1e13], [8e5], "non-embedding")
  width = point.config.model.d_model
  assert point.params == pytest.approx(8e5, rel=0.1)
  assert point.active_params == point.params + 2 * 320 * width


def test_options_on_the_command_line_make_the_planned_config():
  points = plan_points(
    read("tiny", "--config.eval.every=0"), [1e13, 3e13], SIZES
  )
  for options, point in zip(sweep_of(points).values(), points):
    args = [f"--config.{path}={value}" for path, value in options.items()]
    assert read("tiny", "--config.eval.every=0", *args) == point.config
    assert options["eval.every"] == point.steps  # its end is validated


def test_schedules_of_all_lengths_have_one_shape():
  """tiny.py warms up for 40 of 500 steps, and decays over the last fifth."""
  points = plan_points(read("tiny"), [1e13], SIZES)
  for point in points:
    schedule = point.config.optimizer.schedule
    warmup, decay = schedule.lengths(point.steps)
    assert warmup == pytest.approx(0.08 * point.steps, abs=1)
    assert decay == pytest.approx(0.2 * point.steps, abs=1)


def test_phases_have_lengths_of_their_own():
  config = read("olmoe_1b_7b")
  with pytest.raises(ConfigError, match=r"phases \(main, .*\) of lengths"):
    plan_points(config, [1e19], [1e8])
  without = read("olmoe_1b_7b", ONE_PHASE)
  (point,) = plan_points(without, [1e19], [1e8])
  assert point.flops == pytest.approx(1e19, rel=0.05)


SCHEDULE = "--config.optimizer.schedule."


@pytest.mark.parametrize(
  "warmup, decay, name, shares",
  [
    (500, 0, "cosine", (1, 0)),
    (500, 0, "wsd", (1, 0)),
    (0, 500, "wsd", (0, 1)),
    (250, 250, "wsd", (0.5, 0.5)),
    (0.5, 250, "wsd", (0.5, 0.5)),
    (250, 0.5, "wsd", (0.5, 0.5)),
    (0.5, 0.5, "wsd", (0.5, 0.5)),
    (1, 499, "wsd", (0.002, 0.998)),
    (0.0, 0.1, "linear", (0, 0)),
  ],
)
def test_schedules_that_fill_the_run_do_so_at_any_length(
  warmup, decay, name, shares
):
  """tiny.py has 500 steps; a share of 1 would be read as one step."""
  config = read(
    "tiny", f"{SCHEDULE}warmup={float(warmup)}",
    f"{SCHEDULE}decay={float(decay)}", f"{SCHEDULE}name={name}",
  )  # fmt: skip
  budgets = [1e13 * 1.13**i for i in range(8)]
  points = plan_points(config, budgets, [4e5])
  assert {p.steps % 2 for p in points} == {0, 1}
  for point in points:
    found = point.config.optimizer.schedule.lengths(point.steps)
    assert sum(found) <= point.steps
    for steps, share in zip(found, shares):
      assert steps == pytest.approx(share * point.steps, abs=1)


@pytest.mark.parametrize("budgets", [[1e13, 1e13], [1e13, 1.00001e13, 1e13]])
def test_budgets_that_are_one(budgets):
  with pytest.raises(UserError, match="the same [0-9]+ steps of 384,856 param"):
    plan_points(read("tiny"), budgets, [4e5])


def test_names_have_the_digits_that_tell_points_apart():
  points = plan_points(read("tiny"), [1e13, 1.004e13], [2e5, 4e5])
  assert len(sweep_of(points)) == 4
  assert {p.name.partition("-")[0] for p in points} == {"c1e13", "c1.004e13"}
  close = [1.0, 1.0 + 2**-52, 1.00000001]
  names = _names("c", [1e13 * x for x in close])
  assert len(set(names)) == 3
  assert [float(name[1:]) for name in names] == [1e13 * x for x in close]


def test_each_size_found_is_progress():
  found = []
  plan_points(
    read("tiny"), [1e13, 3e13], [2e5, 4e5], advance=lambda: found.append(1)
  )
  assert len(found) == 2


def test_a_size_that_the_tables_alone_exceed():
  with pytest.raises(UserError, match="no size of this config has 2e[+]05"):
    plan_points(read("olmoe_1b_7b", ONE_PHASE), [1e18], [2e5])


def test_two_sizes_that_are_one_model():
  with pytest.raises(UserError, match="give the same model, of 384,856"):
    plan_points(read("tiny"), [1e13], [3.85e5, 3.86e5])


def test_a_budget_of_no_steps_names_a_batch_that_fits():
  config = read("tiny")
  with pytest.raises(UserError, match=r"batch_size=(\d+), a larger") as caught:
    plan_points(config, [2e10], [8e5])
  rows = str(caught.value).split("batch_size=")[1].split(",")[0]
  again = read("tiny", f"--config.train.batch_size={rows}")
  (point,) = plan_points(again, [2e10], [8e5])
  assert point.steps >= 10


def test_a_size_that_devices_cannot_split_is_named():
  config = read("olmoe_1b_7b", ONE_PHASE, "--config.parallel.tensor=16")
  with pytest.raises(ConfigError, match="point c1e20-n9.* does not divide by"):
    plan_points(config, [1e20], [1e8])
