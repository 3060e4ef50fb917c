# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import (
  Config,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  ScheduleConfig,
  TrainConfig,
)
from moejax.errors import ConfigError
from moejax.optimizer import (
  ROUTED,
  decay_mask,
  expert_factor,
  make_optimizer,
  matrix_axes,
  param_paths,
  rate_factors,
  schedule_values,
)
from moejax.routing import top_k


def rates(num_steps=100, **schedule):
  config = Config(
    optimizer=OptimizerConfig(
      learning_rate=2.0, schedule=ScheduleConfig(**schedule)
    ),
    train=TrainConfig(num_steps=num_steps),
  )
  return schedule_values(config)


SHAPES = {
  "exponential": lambda t: 0.1**t,
  "linear": lambda t: 1 - 0.9 * t,
  "1-sqrt": lambda t: 0.1 + 0.9 * (1 - np.sqrt(t)),
  "cosine": lambda t: 0.1 + 0.45 * (1 + np.cos(np.pi * t)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_wsd(shape):
  got = rates(warmup=10.0, decay=0.2, decay_shape=shape, final=0.1)
  np.testing.assert_allclose(got[:10], 2 * np.arange(1, 11) / 10, 1e-6)
  np.testing.assert_array_equal(got[10:80], 2.0)
  t = np.arange(1, 21) / 20
  np.testing.assert_allclose(got[80:], 2 * SHAPES[shape](t), 1e-5)
  assert got[-1] == pytest.approx(0.2)


def test_wsd_can_be_extended_without_changing_the_past():
  short = rates(100, warmup=10.0, decay=20.0)
  long = rates(300, warmup=10.0, decay=20.0)
  np.testing.assert_array_equal(short[:80], long[:80])
  np.testing.assert_array_equal(short[80:], long[280:])


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_other_schedules_warm_up_and_end_at_final(name):
  got = rates(name=name, warmup=0.1, final=0.25)
  assert got[9] == pytest.approx(2.0)
  assert got[-1] == pytest.approx(0.5, rel=1e-6)
  assert (np.diff(got[9:]) <= 0).all()
  middle = 2 * (0.25 + 0.75 / 2)
  assert got[54] == pytest.approx(middle, rel=1e-6)


def test_no_warmup():
  got = rates(warmup=0.0, decay=0.0)
  np.testing.assert_array_equal(got, 2.0)


def test_lengths_that_do_not_fit_are_refused():
  with pytest.raises(ConfigError, match="warmup and .decay, 90 and 20 steps"):
    rates(100, warmup=90.0, decay=20.0)


PARAMS = {"norm": {"scale": jnp.ones(2)}, "moe": {"w_up_EDF": jnp.ones((1, 2))}}


def test_decay_by_path():
  assert decay_mask(PARAMS, ()) == {
    "norm": {"scale": True}, "moe": {"w_up_EDF": True}
  }  # fmt: skip
  assert decay_mask(PARAMS, ("scale$",)) == {
    "norm": {"scale": False}, "moe": {"w_up_EDF": True}
  }  # fmt: skip
  with pytest.raises(ConfigError, match="'scael' matches no parameter"):
    decay_mask(PARAMS, ("scael",))


def of(options, num_steps=100):
  return Config(optimizer=options, train=TrainConfig(num_steps=num_steps))


def adamw_by_hand(config, grads, steps):
  """AdamW of one parameter that starts at 1, float64."""
  p, m, v = 1.0, 0.0, 0.0
  for t, g in enumerate(grads[:steps], 1):
    m = config.b1 * m + (1 - config.b1) * g
    v = config.b2 * v + (1 - config.b2) * g * g
    m_hat, v_hat = m / (1 - config.b1**t), v / (1 - config.b2**t)
    step = m_hat / (np.sqrt(v_hat) + config.eps) + config.weight_decay * p
    p -= config.learning_rate * step
  return p


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_with_clip_against_the_formula(clip):
  config = OptimizerConfig(
    learning_rate=0.1, clip_norm=clip, eps=1e-3,
    schedule=ScheduleConfig(warmup=0.0, decay=0.0),
  )  # fmt: skip
  optimizer = make_optimizer(of(config))
  params = {"w": jnp.ones(1)}
  state = optimizer.init(params)
  grads = [0.2, -0.9, 1.7]
  for g in grads:
    updates, state = optimizer.update({"w": jnp.array([g])}, state, params)
    params = {"w": params["w"] - config.learning_rate * updates["w"]}
  limit = clip or np.inf
  clipped = [np.sign(g) * min(abs(g), limit) for g in grads]
  want = adamw_by_hand(config, clipped, 3)
  np.testing.assert_allclose(params["w"][0], want, 1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, np.nan])
def test_clip_is_that_of_optax(size):
  config = dataclasses.replace(OptimizerConfig(), clip_norm=0.3)
  rng = np.random.default_rng(0)
  draw = lambda p: jnp.asarray(size * rng.normal(size=p.shape), jnp.float32)
  grads = jax.tree.map(draw, PARAMS)
  ours, theirs = (
    make_optimizer(of(config, 10_000)),
    optax.chain(
      optax.clip_by_global_norm(0.3),
      make_optimizer(of(dataclasses.replace(config, clip_norm=0.0), 10_000)),
    ),
  )
  (_, got), (_, want) = (
    optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    for optimizer in (ours, theirs)
  )
  # The moments: the first step of Adam is the same at any size of gradient.
  for name in ("mu", "nu"):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, 1e-6),
      optax.tree.get(got, name), optax.tree.get(want, name),
    )  # fmt: skip


def test_decay_mask_reaches_the_optimizer():
  config = dataclasses.replace(
    OptimizerConfig(), weight_decay=0.5, no_decay=("scale",), clip_norm=0.0
  )
  optimizer = make_optimizer(of(config, 10_000))
  state = optimizer.init(PARAMS)
  zero = {
    "norm": {"scale": jnp.zeros(2)},
    "moe": {"w_up_EDF": jnp.zeros((1, 2))},
  }
  updates, _ = optimizer.update(zero, state, PARAMS)
  assert (updates["norm"]["scale"] == 0).all()
  assert (updates["moe"]["w_up_EDF"] > 0).all()  # goes in times -rate


def with_rates(k=1, num_experts=16, **options):
  moe = MoEConfig(num_experts=num_experts, router=f"top_k(k={k})")
  return dataclasses.replace(
    of(OptimizerConfig(**options), 10_000), model=ModelConfig(moe=moe)
  )


def test_expert_rate_is_the_published_rule():
  """Hunyuan-Large: 16 experts, top-1, 0.31; limits and OLMoE's 64 top-8."""
  factor = lambda rate, *args: expert_factor(
    with_rates(*args, expert_rate=rate)
  )
  assert factor("batch_share(x=0.26)") == pytest.approx(0.31, abs=0.005)
  assert factor("batch_share(x=0)") == 0.25
  assert factor("batch_share(x=4)") == pytest.approx(1.0)
  assert factor("batch_share(x=0.26)", 8, 64) == pytest.approx(0.43, abs=0.005)
  assert factor("batch_share(x=0)", 8, 64) == pytest.approx(0.354, abs=0.001)
  assert factor("fixed(factor=0.5)") == 0.5
  assert factor("same") == 1.0


def best_rate(batch, noise):
  return 2 / (np.sqrt(noise / batch) + np.sqrt(batch / noise))


@pytest.mark.parametrize("x", [0.01, 0.26, 4.0, 50.0])
def test_expert_rate_from_the_formula(x):
  got = expert_factor(with_rates(2, 8, expert_rate=f"batch_share(x={x})"))
  assert got == pytest.approx(best_rate(x / 4, 1) / best_rate(x, 1))


def by_the_logits(logits_TE, mask_T, *, rng=None):
  """A list of its own: no number of experts, and no k that says it."""
  return top_k(logits_TE, mask_T, k=2).replace(experts_per_token=0)


def with_router(router, rate="batch_share(x=0.26)"):
  moe = MoEConfig(num_experts=16, router=router)
  return dataclasses.replace(
    of(OptimizerConfig(expert_rate=rate), 10_000), model=ModelConfig(moe=moe)
  )


@pytest.mark.parametrize(
  "router",
  [
    "top_p(k=4, p=0.5)", "null_experts(k=2, num_null=4)",
    f"{__name__}.by_the_logits",
  ],
)  # fmt: skip
def test_a_share_of_the_batch_needs_a_number_of_experts(router):
  """By k alone top_p(k=4) of 4 experts had a factor of 1."""
  message = r"share\(x=0.26\)' goes by .* varies or is not known: use fixed\("
  with pytest.raises(ConfigError, match=message):
    expert_factor(with_router(router))
  assert expert_factor(with_router(router, "fixed(factor=0.5)")) == 0.5


@pytest.mark.parametrize(
  "router, k",
  [
    ("recycle(group_size=8)", 1), ("switch(group_size=8)", 1),
    ("expert_choice(k=2, group_size=16)", 2), ("hash_tokens(k=4)", 4),
    ("sinkhorn(k=2, group_size=8)", 2),
  ],
)  # fmt: skip
def test_routers_whose_number_of_experts_is_known(router, k):
  got = expert_factor(with_router(router, "batch_share(x=0)"))
  assert got == pytest.approx((k / 16) ** 0.5)


def test_a_rate_of_experts_that_are_not_there_is_named():
  dense = {"mlp": {"w_up_DF": jnp.ones((2, 3))}}
  message = r"expert_rate='fixed\(factor=0.3\)': the model has no routed expe"
  with pytest.raises(ConfigError, match=message):
    first_update(with_rates(expert_rate="fixed(factor=0.3)"), dense, dense)


SEVERAL = {
  "norm": {"scale": jnp.ones(2)},
  "moe": {
    "w_up_EDF": jnp.ones((1, 2, 3)), "w_router_DE": jnp.ones((2, 1)),
    "shared": {"w_up_DF": jnp.ones((2, 3))},
  },
  "attention": {"w_o_EKHD": jnp.ones((1, 2, 2, 3))},
}  # fmt: skip


def first_update(config, grads, params):
  optimizer = make_optimizer(config)
  return optimizer.update(grads, optimizer.init(params), params)[0]


def test_rates_reach_their_parameters_alone():
  rates = {"rates": ("w_router=0.25", "w_=3"), "clip_norm": 0.0}
  grads = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), SEVERAL)
  plain = first_update(with_rates(clip_norm=0.0), grads, SEVERAL)
  scaled = first_update(with_rates(**rates), grads, SEVERAL)
  ratio = jax.tree.map(lambda a, b: float((a / b).mean()), scaled, plain)
  assert ratio["norm"]["scale"] == 1
  assert ratio["moe"]["w_router_DE"] == pytest.approx(0.25)
  assert ratio["moe"]["w_up_EDF"] == pytest.approx(3)
  config = with_rates(expert_rate="fixed(factor=0.5)", clip_norm=0.0)
  scaled = first_update(config, grads, SEVERAL)
  ratio = jax.tree.map(lambda a, b: float((a / b).mean()), scaled, plain)
  assert ratio["moe"]["w_up_EDF"] == ratio["attention"]["w_o_EKHD"] == 0.5
  assert ratio["moe"]["shared"]["w_up_DF"] == 1
  assert ratio["moe"]["w_router_DE"] == 1
  assert rate_factors(config) == ((ROUTED, 0.5),)
  with pytest.raises(ConfigError, match="'w_ruoter' matches no parameter"):
    first_update(with_rates(rates=("w_ruoter=2",)), grads, SEVERAL)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"rates": ("w_router",)}, "is not PATTERN=FACTOR"),
    ({"rates": ("w_router=x",)}, "is not PATTERN=FACTOR"),
    ({"rates": ("(=2",)}, "no regular expression"),
    ({"expert_rate": "batch_share"}, "takes x"),
    ({"expert_rate": "batchshare(x=1)"}, "did you mean 'batch_share'"),
    ({"expert_rate": "fixed(factor=-1)"}, "not negative"),
    ({"name": "adam"}, "did you mean 'adamw'"),
    ({"mu_dtype": "float16"}, "is not one of"),
  ],
)
def test_bad_options_are_one_line(options, message):
  with pytest.raises(ConfigError, match=message):
    OptimizerConfig(**options)


def test_which_matrices_muon_moves():
  stacked = jax.tree.map(lambda p: p[None], SEVERAL)
  for tree, shift in ((SEVERAL, 0), (stacked, 1)):
    found = matrix_axes(tree, ("w_router",))
    assert found["norm"]["scale"] is None
    assert found["moe"]["w_router_DE"] is None
    at = lambda *axes, shift=shift: tuple(axis + shift for axis in axes)
    assert found["moe"]["w_up_EDF"] == (at(1), at(2))
    assert found["moe"]["shared"]["w_up_DF"] == (at(0), at(1))
    assert found["attention"]["w_o_EKHD"] == (at(1, 2), at(3))


def orthogonal(matrix):
  """Newton and Schulz's iteration with Muon's coefficients, float64."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = matrix.astype(np.float64)
  x = x.T if x.shape[0] > x.shape[1] else x
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_muon_against_the_formula():
  """The first step: Nesterov's gradient is (1 - b1) (1 + b1) g."""
  config = with_rates(
    name="muon", learning_rate=0.1, clip_norm=0.0, weight_decay=0.1,
    muon_adam=(), schedule=ScheduleConfig(warmup=0.0, decay=0.0),
  )  # fmt: skip
  rng = np.random.default_rng(0)
  params = {
    "moe": {"w_up_EDF": jnp.asarray(rng.normal(size=(3, 8, 5)), jnp.float32)},
    "attention": {
      "w_q_DNH": jnp.asarray(rng.normal(size=(8, 2, 3)), jnp.float32)
    },
  }
  grads = jax.tree.map(
    lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params
  )
  got = first_update(config, grads, params)

  def want(grad, param):
    rows, columns = grad.shape
    update = 0.2 * np.sqrt(max(rows, columns)) * orthogonal(grad)
    return update + 0.1 * param

  for e in range(3):
    np.testing.assert_allclose(
      got["moe"]["w_up_EDF"][e],
      want(*(np.asarray(t["moe"]["w_up_EDF"][e]) for t in (grads, params))),
      rtol=2e-4, atol=1e-5,
    )  # fmt: skip
  q = [np.asarray(t["attention"]["w_q_DNH"]).reshape(8, 6)
       for t in (grads, params)]  # fmt: skip
  np.testing.assert_allclose(
    got["attention"]["w_q_DNH"].reshape(8, 6), want(*q), rtol=2e-4, atol=1e-5
  )


def test_half_the_memory_of_the_first_moment():
  state = make_optimizer(with_rates(mu_dtype="bfloat16")).init(SEVERAL)
  mu, nu = (optax.tree.get(state, name) for name in ("mu", "nu"))
  assert {x.dtype for x in jax.tree.leaves(mu)} == {jnp.bfloat16.dtype}
  assert {x.dtype for x in jax.tree.leaves(nu)} == {np.dtype("float32")}
  assert jax.tree.leaves(param_paths(mu)) == jax.tree.leaves(
    param_paths(SEVERAL)
  )
