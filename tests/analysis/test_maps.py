# SPDX-License-Identifier: Apache-2.0
"""Which experts a picture shows, and what its title and axes say."""

import dataclasses

import numpy as np
import pytest

from moejax.analysis import maps
from moejax.analysis.measures import CoActivation, DomainSpecialisation
from moejax.report.pictures import save_png
from moejax.report.style import new_figure, plot_style, short_name

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


def of_domains(*share_UE, routers=1):
  """Shares of experts by domain, the same at each router; k is 2."""
  share_ULE = np.repeat(np.array(share_UE)[:, None], routers, axis=1)
  U, L, experts = share_ULE.shape
  return DomainSpecialisation(
    tuple(f"layer {i}" for i in range(L)),
    ("c4", "code", "wiki")[:U], share_ULE, share_ULE, np.ones(U),
    np.full(L, 2 / experts),
  )  # fmt: skip


def drawn(chart, narrow=False):
  with plot_style():
    figure = new_figure(*(chart.narrow_size if narrow else chart.size))
    chart.draw(figure, narrow)
    figure.draw_without_rendering()
  return figure


BUSY = 0.7, 0.72, 0.77  # of every domain: load
SPECIAL = 0.05, 0.25, 0.06  # of code: specialisation


def test_the_title_of_domains_is_of_specialisation_not_of_load():
  rest = [(2 - a - b) / 6 for a, b in zip(BUSY, SPECIAL)]
  rows = [[a, b, *[c] * 6] for a, b, c in zip(BUSY, SPECIAL, rest)]
  result = of_domains(*rows)
  title = maps.domain_chart(result).title
  assert title == (
    "Expert 1 of layer 0 gets 25\u00a0% of the tokens of code; its mean over "
    "domains is 12\u00a0%"
  )


def test_an_expert_that_has_less_of_a_domain_is_special_too():
  rows = [[0.7, 0.5, 0.5, 0.3], [0.7, 0.5, 0.4, 0.4], [0.1, 0.5, 0.7, 0.7]]
  assert maps.domain_chart(of_domains(*rows)).title == (
    "Expert 0 of layer 0 gets 10\u00a0% of the tokens of wiki; its mean over "
    "domains is 50\u00a0%"
  )


def test_one_domain_tells_no_specialisation():
  title = maps.domain_chart(of_domains([0.9, 0.5, 0.3, 0.3])).title
  assert title == (
    "Expert 0 of layer 0 gets 90\u00a0% of the tokens of c4, chance is "
    "50\u00a0%; one domain tells no specialisation from load"
  )


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("top", [0.013, 0.31, 0.77, 0.92, 1.0])
def test_bars_end_below_a_labelled_tick(narrow, top):
  shares = np.full((2, 8), top / 2)
  shares[1, 3] = top
  figure = drawn(maps.domain_chart(of_domains(*shares, routers=2)), narrow)
  for ax in figure.get_axes():
    assert 1 >= ax.get_yticks()[-1] >= top and 3 <= len(ax.get_yticks()) <= 6
    assert ax.get_ylim()[1] >= ax.get_yticks()[-1]
  lowest = figure.get_axes()[-1]
  assert [x.get_text() for x in lowest.get_xticklabels()] == list("01234567")
  told = [x.get_text() for x in figure.legends[0].get_texts()]
  assert told == [
    "chance: k/E = 25\u00a0%", "the expert's mean over domains"
  ]  # fmt: skip


def test_the_chance_of_pairs_says_how_it_is_counted():
  """With two or three experts a token, and with two alone."""
  share_EE = shares(4)[:8, :8]
  of = lambda chance: maps.co_activation_chart(
    CoActivation(
      ("layer 0", "layer 1"), np.stack([share_EE] * 2), np.ones((2, 8), int),
      np.array(chance),
    )
  ).note  # fmt: skip
  assert "(k - 1)/(E - 1) = 14.3\u00a0%" in of([1 / 7, 1 / 7])
  varying = of([0.13, 0.144])
  assert "(k - 1)/(E - 1)" not in varying
  assert "13.7\u00a0%, the mean over routers" in varying


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
  "name", ["a$\\frac{$", "n" * 200, "中文" * 60, "$5, $6"]
)
def test_any_name_of_a_domain(name, narrow, tmp_path):
  """No TeX, and no layout that a long name collapses; warnings are errors."""
  share = np.full((3, 8), 0.25)
  share[0, 3] = 0.4
  result = dataclasses.replace(
    of_domains(*share, routers=3), domains=(name, "code", "wiki")
  )
  chart = maps.domain_chart(result)
  assert short_name(name) in chart.title
  save_png(chart, tmp_path / "domains.png")
  figure = drawn(chart, narrow)
  titles = [ax.get_title(loc="left") for ax in figure.get_axes()]
  assert f"{short_name(name)}, layer 0" in titles
  assert figure.get_axes()[0].get_window_extent().width > 150
