# SPDX-License-Identifier: Apache-2.0
"""Cosines between experts, against float64 loops over experts and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import analysis
from moejax.analysis import similarities
from moejax.models import Rows, watched_routers
from tests.analysis.small_model import E, make_run, make_texts


def cosine(a, b):
  return a @ b / np.sqrt((a @ a) * (b @ b))


def expert_parts(run, layer):
  """Parameters of the MoE layer and its attention, in float64."""
  params = run.variables["params"]
  if "repeats" in params:
    block, at = params["repeats"]["block_0"], layer - 1
  else:
    block, at = params[f"repeats_{layer - 1}"]["block_0"], ...
  return {
    kind: {name: np.float64(w[at]) for name, w in block[kind].items()}
    for kind in ("attention", "moe")
  }


@pytest.mark.parametrize("scan_layers", [True, False])
def test_against_loops(tmp_path, scan_layers):
  run = analysis.load(make_run(tmp_path / "run", scan_layers=scan_layers))
  plan = analysis.Plan(make_texts(tmp_path), sample=41)
  result = analysis.similarity(run, plan)
  assert result.num_tokens == 42  # as many of each domain
  x_LTD = similarities.sample_inputs(run, plan)
  assert len(np.unique(x_LTD[0], axis=0)) > 20
  for router, name in enumerate(result.routers):
    parts = expert_parts(run, int(name.split()[1]))
    x_TD = np.float64(x_LTD[router])
    if name.endswith("attention"):
      w = parts["attention"]
      matrices = w["w_q_EDKH"], w["w_o_EKHD"]
      outputs = [x_TD @ w["w_q_EDKH"][e].reshape(24, -1) for e in range(E)]
    else:
      w = parts["moe"]
      matrices = w["w_gate_EDF"], w["w_up_EDF"], w["w_down_EFD"]
      outputs = []
      for gate, up, down in zip(*matrices, strict=True):
        gated = x_TD @ gate
        gated = gated / (1 + np.exp(-gated)) * (x_TD @ up)
        outputs.append(gated @ down)
    flat = [np.concatenate([m[e].ravel() for m in matrices]) for e in range(E)]
    for i in range(E):
      for j in range(E):
        weights = cosine(flat[i], flat[j])
        each = [cosine(a, b) for a, b in zip(outputs[i], outputs[j])]
        have = (
          result.weights_LEE[router, i, j],
          result.outputs_LEE[router, i, j],
        )
        np.testing.assert_allclose(
          have, [weights, np.mean(each)], rtol=1e-4, atol=2e-6
        )


def inputs_of(run, plan):
  """[L, T, D] of all tokens of the plan's text, domain by domain."""

  @jax.jit
  def watch(tokens_BT, rows):
    given = run.variables, tokens_BT, rows
    _, state = run.model.apply(*given, mutable=["routing"])
    return watched_routers(run.config.model, state["routing"]).x_BTD

  found = []
  for _, batch in plan.batches(run.tokenizer, run.config.data):
    rows = Rows(*map(jnp.asarray, (batch["segment_ids"], batch["positions"])))
    x_LBTD = np.asarray(watch(batch["tokens"], rows))
    found.append(x_LBTD[:, batch["segment_ids"] > 0])
  return np.concatenate(found, axis=1)


def test_a_sample_is_read_from_as_many_batches_as_it_takes(tmp_path):
  run = analysis.load(make_run(tmp_path / "run"))
  letters = np.random.default_rng(5).integers(97, 123, (2, 600), np.uint8)
  for name, line in zip("ab", letters):
    (tmp_path / f"{name}.txt").write_bytes(line.tobytes())
  texts = {name: [str(tmp_path / f"{name}.txt")] for name in "ab"}
  plan = analysis.Plan(texts, batch_size=1, sample=500)
  every = inputs_of(run, plan)
  sample = similarities.sample_inputs(run, plan)
  assert sample.shape[1] == 500  # a batch has 32
  # In each half are tokens of a domain, and none is there twice, but that the
  # first ones of eight windows may be the same letter.
  halves = np.split(sample[3], 2), np.split(every[3], 2)
  for mine_TD, all_TD in zip(*halves, strict=True):
    apart = np.abs(mine_TD[:, None] - all_TD[None]).max(-1)
    assert apart.min(1).max() < 1e-4 * np.abs(all_TD).max()
    assert len(set(apart.argmin(1))) >= 250 - 8
  few = analysis.Plan({"a": texts["a"]}, tokens=96, sample=500, batch_size=2)
  assert analysis.similarity(run, few).num_tokens == 96


def test_the_same_expert_twice_has_cosine_one(tmp_path):
  run = analysis.load(make_run(tmp_path / "run"))
  moe = run.variables["params"]["repeats"]["block_0"]["moe"]
  for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"):
    moe[name] = moe[name].at[:, 4].set(2 * moe[name][:, 1])
  plan = analysis.Plan(make_texts(tmp_path), sample=20)
  result = analysis.similarity(run, plan)
  for router in (1, 3):
    np.testing.assert_allclose(result.weights_LEE[router, 1, 4], 1, rtol=1e-5)
    assert result.weights_LEE[router, 1, 3] < 0.5
  np.testing.assert_allclose(
    result.outputs_LEE[:, np.arange(E), np.arange(E)], 1, rtol=1e-5
  )
