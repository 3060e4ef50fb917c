# SPDX-License-Identifier: Apache-2.0
"""The mixture: exact shares, no row lost where weights change."""

import numpy as np
import pytest

from moejax.data.mixture import Mixture


def draw(mixture, rows):
  return np.array([mixture[row] for row in rows])


def largest_error(mixture, weights, count):
  """Largest |rows - share| of any source over all prefixes of `count` rows."""
  sources = draw(mixture, range(count))[:, 0]
  shares = np.asarray(weights) / np.sum(weights)
  rows = np.arange(1, count + 1)
  return max(
    np.abs(np.cumsum(sources == s) - rows * share).max()
    for s, share in enumerate(shares)
  )


@pytest.mark.parametrize(
  "weights",
  [(1.0,), (0.7, 0.3), (0.5, 0.3, 0.2), (47092.0, 811.0, 3.0), (8, 4, 2, 1)],
)
def test_any_prefix_has_its_shares_give_or_take_one_row(weights):
  weights = tuple(map(float, weights))
  assert largest_error(Mixture([(0, weights)]), weights, 20_000) <= 1


def test_shares_over_a_million_rows():
  weights = np.array([0.62, 0.31, 0.0699, 0.0001])
  mixture = Mixture([(0, weights.tolist())])
  for rows in range(1, 1_000_000, 37):
    assert np.abs(mixture.counts(rows) - rows * weights).max() <= 1


def test_counts_are_what_is_drawn():
  mixture = Mixture([(0, (0.5, 0.3, 0.2)), (70, (0.1, 0.8, 0.1))])
  sources = draw(mixture, range(500))[:, 0]
  for rows in range(500):
    drawn = np.bincount(sources[:rows], minlength=3)
    assert np.array_equal(mixture.counts(rows), drawn)


def test_many_sources_stay_within_the_documented_bound():
  rng = np.random.default_rng(0)
  for count in (6, 8, 20):
    weights = tuple(float(w) for w in rng.random(count) ** 3)
    assert largest_error(Mixture([(0, weights)]), weights, 20_000) < 1.5


@pytest.mark.parametrize("weights", [(0.7, 0.3), (5.0, 0.0, 2.0, 3.0)])
def test_each_source_is_read_row_by_row(weights):
  drawn = draw(Mixture([(0, weights)]), range(5000))
  for s, weight in enumerate(weights):
    rows = drawn[drawn[:, 0] == s, 1]
    assert np.array_equal(rows, np.arange(len(rows)))
    assert bool(len(rows)) == bool(weight)


def test_weights_of_the_sizes_read_each_row_once_an_epoch():
  sizes = (1234.0, 77.0, 5000.0, 1.0)
  drawn = draw(Mixture([(0, sizes)]), range(int(sum(sizes))))
  assert np.array_equal(np.bincount(drawn[:, 0]), sizes)


def test_rows_far_away_cost_no_more_and_agree_with_the_counts():
  mixture = Mixture([(0, (0.7, 0.2, 0.1))])
  for row in (10**9, 10**15 + 7):
    source, index = mixture[row]
    assert mixture.counts(row)[source] == index
    assert mixture.counts(row + 1)[source] == index + 1
    assert sum(mixture.counts(row)) == row


def test_no_row_repeats_or_is_skipped_between_phases():
  mixture = Mixture(
    [
      (0, (0.9, 0.1, 0.0)),
      (1001, (0.2, 0.3, 0.5)),
      (2503, (0.0, 0.0, 1.0)),
    ]
  )
  drawn = draw(mixture, range(4000))
  for s in range(3):
    rows = drawn[drawn[:, 0] == s, 1]
    assert np.array_equal(rows, np.arange(len(rows)))
  late = drawn[1001:2503, 0]
  assert np.abs(np.bincount(late) / len(late) - [0.2, 0.3, 0.5]).max() < 0.001
  assert set(drawn[2503:, 0]) == {2}


@pytest.mark.parametrize(
  "phases, message",
  [
    ([], "row 0"),
    ([(5, (1.0,))], "row 0"),
    ([(0, (0.0, 0.0))], "not all zero"),
    ([(0, (1.0, -1.0))], ">= 0"),
    ([(0, (1.0, 1.0)), (10, (1.0,))], "1 weights"),
    ([(0, (1.0,)), (10, (1.0,)), (10, (1.0,))], "starts before"),
  ],
)
def test_impossible_mixtures_are_refused(phases, message):
  with pytest.raises(ValueError, match=message):
    Mixture(phases)
