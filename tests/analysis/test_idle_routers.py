# SPDX-License-Identifier: Apache-2.0
"""Routers that send no token to any true expert, as null experts allow."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.__main__ import main
from moejax.analysis import command, counts, page, results
from moejax.analysis.surveys import Overlap, Survey
from moejax.report.style import new_figure, plot_style
from moejax.routing import Routing
from tests.analysis.small_model import E, make_run, make_texts

L, N = 3, 50


def survey_of(idle, step=1):
  """Two experts a token, one of four at random and the next one."""
  rng = np.random.default_rng(step)
  chosen = np.zeros((L, N, 4), bool)
  first = rng.integers(4, size=(L, N))
  for more in (0, 1):
    np.put_along_axis(chosen, (first[..., None] + more) % 4, True, axis=-1)
  chosen[idle] = False
  top_LE = (chosen & (first[..., None] == np.arange(4))).sum(1)
  whole = chosen.astype(int)
  tally = counts.Tally(
    N, whole.sum(1), top_LE, np.einsum("lte,ltf->lef", whole, whole),
    np.full(L, 0.9 * N),
  )  # fmt: skip
  routers = tuple(f"layer {i}" for i in range(L))
  of_one_id = lambda count_LE: np.tile(count_LE, (3, 1, 1, 1))
  words = counts.Words(
    np.full((3, 1), N), of_one_id(tally.chosen_LE), of_one_id(top_LE)
  )
  return Survey(step, routers, 4, {"code": tally}, words)


@pytest.mark.parametrize("idle", [0, 1, [0, 2], [0, 1, 2]])
def test_all_measures_and_pictures(idle):
  """Dead experts have load 0; what there is none of is null, not a crash."""
  last = survey_of(idle, 2)
  idle = np.atleast_1d(idle)
  wanted_L = last.total.chosen_LE.sum(1)
  overlap = Overlap(wanted_L // 2, wanted_L, wanted_L // 4, wanted_L // 2)
  first = dataclasses.replace(survey_of(idle), overlap=overlap)
  found, left_out = command.measure([first, last], 5)
  assert ("co_activation" in found) == (len(idle) < L)
  names = ", ".join(f"layer {i}" for i in idle)
  assert any(x.startswith(f"{names}: no token went") for x in left_out)
  np.testing.assert_array_equal(found["load"].load_MLE[:, idle], 0)
  told = {name: results.summary(result) for name, result in found.items()}
  if "co_activation" in found:
    pairs = told["co_activation"]["strongest_pair"]
    assert [i for i in range(L) if pairs[i]["share"] is None] == idle.tolist()
  for result in found.values():
    results.columns(result)
    for chart in page.charts(result):
      assert "nan" not in chart.title + chart.note
      for narrow in (False, True):
        with plot_style():
          figure = new_figure(*(chart.narrow_size if narrow else chart.size))
          chart.draw(figure, narrow)
          figure.draw_without_rendering()
  (chart, *_) = page.charts(found["load"])
  assert f"No token went to any expert of {names}." in chart.note
  assert "of 12 less than a tenth" in chart.title
  starved = int(chart.title.split("; ")[1].split()[0])
  assert starved == 4 * len(idle)


def nowhere(logits_TE, mask_T, *, k, rng=None):
  expert_TX = jnp.zeros((logits_TE.shape[0], k), jnp.int32)
  unused_TX = jnp.ones(expert_TX.shape, bool)
  return Routing.from_token_choice(
    expert_TX, jnp.ones(expert_TX.shape), logits_TE, mask_T, unused_TX
  )


def test_a_model_that_uses_no_expert_has_a_page(tmp_path, monkeypatch, capsys):
  make_texts(tmp_path)
  router = f"{__name__}.nowhere(k=1)"
  make_run(
    tmp_path / "run", pattern=("attention/moe",), prefix=(),
    moe={"num_experts": E, "d_expert": 12, "router": router},
  )  # fmt: skip
  monkeypatch.chdir(tmp_path)
  assert main(["analyze", "run", "--data=code", "--tokens=512"]) == 0
  assert "note: layer 0, layer 1" in capsys.readouterr().out
  told = json.loads((tmp_path / "run/analysis/summary.json").read_text())
  np.testing.assert_array_equal(told["load"]["largest"], 0)
