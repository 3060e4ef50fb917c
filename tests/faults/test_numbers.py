# SPDX-License-Identifier: Apache-2.0
"""NaN in what routers see, and devices that no longer agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import loop, routing
from moejax.__main__ import main
from moejax.checkpoint import CheckpointReader
from moejax.routing.inputs import asks_for
from tests.parallel.test_copies import flip

T, E = 16, 8
BAD = 5
# Routers that look at one token at a time.
ALONE = {
  "top_k": {"k": 2},
  "group_limited": {"k": 2, "num_groups": 4, "topk_groups": 2},
  "top_p": {"k": 4, "p": 0.5},
  "attention_heads": {"k": 2},
}


@pytest.mark.parametrize("name", ALONE)
def test_one_token_of_nan_moves_no_other(name):
  router = getattr(routing, name)
  key = jax.random.key(0)
  inputs = {"rng": key} if asks_for(router, "rng") else {}
  logits_TE = jax.random.normal(key, (T, E))
  mask_T = jnp.ones(T, bool)
  run = lambda logits: router(logits, mask_T, **ALONE[name], **inputs)
  good = run(logits_TE)
  poisoned = run(logits_TE.at[BAD].set(jnp.nan))
  expert_A = np.asarray(poisoned.expert_A)
  assert ((expert_A >= 0) & (expert_A <= E)).all()
  others = np.asarray(good.token_A) != BAD
  for field in ("token_A", "expert_A", "weight_A"):
    before, after = (np.asarray(getattr(r, field)) for r in (good, poisoned))
    np.testing.assert_array_equal(before[others], after[others])


def test_a_device_that_differs_ends_the_run(place, monkeypatch, capsys):
  """A bit of one device's memory flips right before step 10 is saved.

  Earlier ones are healed where copies gather what others computed.
  """
  monkeypatch.chdir(place)
  after_step = loop.Loop._after_step

  def struck(self):
    if self.step == 10:
      params = dict(self.state.params)
      params["w_embed_VD"] = flip(params["w_embed_VD"], copy=1, bit=1234)
      self.state = self.state.replace(params=params)
    after_step(self)

  monkeypatch.setattr(loop.Loop, "_after_step", struck)
  args = ["--config=config.py", "--workdir=struck", "--config.parallel.data=8",
          "--config.train.batch_size=8"]  # fmt: skip
  assert main(["train", *args]) == 2
  error = capsys.readouterr().err
  assert "devices hold different copies of params/" in error
  assert "after step 10: a device or its memory is faulty" in error
  assert CheckpointReader(place / "struck" / "checkpoints").steps() == [5]
