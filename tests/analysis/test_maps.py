# SPDX-License-Identifier: Apache-2.0
"""Which experts a heat map shows."""

import numpy as np
import pytest

from moejax.analysis import maps
from moejax.analysis.measures import CoActivation
from moejax.report.style import new_figure, plot_style

E = 48


def shares(seed):
  """A layer's co-activation: asymmetric, and of nothing on the diagonal."""
  share_EE = np.random.default_rng(seed).uniform(0.1, 0.2, (E, E))
  np.fill_diagonal(share_EE, np.nan)
  return share_EE


@pytest.mark.parametrize("expert, busy", [(47, 3), (5, 40)])
def test_the_partner_of_the_highest_value_is_shown(expert, busy):
  """Co(i, j) is high where j is busy, whose own row is the lowest of all."""
  share_EE = shares(0)
  share_EE[busy] = 0.01
  share_EE[expert, busy] = 0.9
  share_EE[7] = np.nan  # never chosen
  kept, values = maps.strongest(share_EE)
  assert len(kept) == maps.MAX_EXPERTS and (np.diff(kept) > 0).all()
  assert {expert, busy} <= set(kept)
  assert np.nanmax(values) == 0.9
  np.testing.assert_array_equal(values, share_EE[np.ix_(kept, kept)])


def test_the_pair_of_the_title_is_shown_among_equals():
  share_EE = shares(1)
  share_EE[:40, 47] = 1.0
  kept, _ = maps.strongest(share_EE)
  assert {0, 47} <= set(kept)


def test_few_experts_are_all_shown():
  share_EE = shares(2)[:9, :9]
  kept, values = maps.strongest(share_EE)
  np.testing.assert_array_equal(kept, np.arange(9))
  np.testing.assert_array_equal(values, share_EE)


def test_title_and_scale_of_co_activation_are_of_what_is_shown():
  share_EE = shares(3)
  share_EE[3] = 0.01
  share_EE[47, 3] = 0.9
  result = CoActivation(
    ("layer 0",), share_EE[None], np.ones((1, E), int), np.array([0.15])
  )
  chart = maps.co_activation_chart(result)
  assert "expert 3 has 90\u00a0% of expert 47's" in chart.title
  with plot_style():
    figure = new_figure(*chart.size)
    chart.draw(figure, False)
    figure.draw_without_rendering()
  image = figure.get_axes()[0].get_images()[0]
  assert image.get_array().max() == 0.9 == image.norm.vmax
