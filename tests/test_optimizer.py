# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from moejax.errors import ConfigError
from moejax.optimizer import (
  decay_mask,
  make_optimizer,
  make_schedule,
  schedule_values,
)


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
  optimizer = make_optimizer(config, make_schedule(config, 100))
  params = {"w": jnp.ones(1)}
  state = optimizer.init(params)
  grads = [0.2, -0.9, 1.7]
  for g in grads:
    updates, state = optimizer.update({"w": jnp.array([g])}, state, params)
    params = {"w": params["w"] + updates["w"]}
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
    make_optimizer(config, make_schedule(config, 10_000)),
    optax.chain(
      optax.clip_by_global_norm(0.3),
      make_optimizer(
        dataclasses.replace(config, clip_norm=0.0),
        make_schedule(config, 10_000),
      ),
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
  optimizer = make_optimizer(config, make_schedule(config, 10_000))
  state = optimizer.init(PARAMS)
  zero = {
    "norm": {"scale": jnp.zeros(2)},
    "moe": {"w_up_EDF": jnp.zeros((1, 2))},
  }
  updates, _ = optimizer.update(zero, state, PARAMS)
  assert (updates["norm"]["scale"] == 0).all()
  assert (updates["moe"]["w_up_EDF"] < 0).all()
