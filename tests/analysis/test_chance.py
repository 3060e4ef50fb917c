# SPDX-License-Identifier: Apache-2.0
"""Chance levels of routers blind to tokens, against closed forms."""

import itertools

import numpy as np
import pytest
from scipy import stats

from moejax.analysis import chance

TOKENS, DRAWS = 2**14, 2**12


def close(have, want, deviation, n):
  """Within five standard errors of what is drawn from `TOKENS` tokens."""
  error = deviation * np.sqrt(1 / DRAWS + n / TOKENS)
  assert abs(have - want) <= 5 * error, (have, want, error)


def moments(values, probs):
  mean = (values * probs).sum()
  return mean, np.sqrt(((values - mean) ** 2 * probs).sum())


@pytest.mark.parametrize("n", [2, 11, 200])
@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_two_experts_one_a_token(n, p):
  """What one does not get the other gets: max(x, n - x) of a binomial."""
  have = chance.largest_shares([np.full(7, n)], np.array([[p, 1 - p]]))
  x = np.arange(n + 1)
  probs = stats.binom.pmf(x, n, p)
  close(have[0, 0], *moments(np.maximum(x, n - x) / n, probs), n)


def test_best_of_five_experts():
  n, p = 9, np.array([0.4, 0.3, 0.15, 0.1, 0.05])
  have = chance.largest_shares([np.full(3, n)], p[None])
  counts = [x for x in itertools.product(range(n + 1), repeat=5) if sum(x) == n]
  probs = stats.multinomial.pmf(counts, n, p)
  close(have[0, 0], *moments(np.max(counts, axis=1) / n, probs), n)


@pytest.mark.parametrize("p", [(2 / 3, 2 / 3, 2 / 3), (0.9, 0.6, 0.5)])
def test_two_of_three_experts_leave_one_out(p):
  """The busiest is the one that is left out least, of a multinomial."""
  n = 12
  have = chance.largest_shares([np.full(3, n)], np.array([p]))
  counts = [x for x in itertools.product(range(n + 1), repeat=3) if sum(x) == n]
  probs = stats.multinomial.pmf(counts, n, 1 - np.array(p))
  close(have[0, 0], *moments(1 - np.min(counts, axis=1) / n, probs), n)


def test_ids_of_all_numbers_of_occurrences_have_the_same_weight():
  """One frequent id does not hide the rare ones; layers and kinds are apart."""
  seen = [np.array([4] * 9 + [10**6]), np.full(2000, 30)]
  prob_LE = np.array([[0.5, 0.5], [1.0, 0.0]])
  have = chance.largest_shares(seen, prob_LE)
  x = np.arange(5)
  rare, deviation = moments(
    np.maximum(x, 4 - x) / 4, stats.binom.pmf(x, 4, 0.5)
  )
  close(have[0, 0], 0.9 * rare + 0.1 * 0.5, 0.9 * deviation + 0.1 / 128, 4)
  x = np.arange(31)
  want = moments(np.maximum(x, 30 - x) / 30, stats.binom.pmf(x, 30, 0.5))
  close(have[1, 0], *want, 30)
  np.testing.assert_array_equal(have[:, 1], 1.0)


def test_more_occurrences_than_are_drawn_are_closer_to_the_mean():
  n = 400 * TOKENS
  have = chance.largest_shares([np.array([n])], np.array([[0.5, 0.5]]))
  assert 0 < have[0, 0] - 0.5 < 5 * 0.5 / np.sqrt(n)


@pytest.mark.parametrize(
  "p", [(0.9, 0.5, 0.3, 0.3), (0.25,) * 4, (1.0, 1.0, 0.6, 0.1), (0.2, 0.1)]
)
def test_tokens_have_their_number_of_experts_each_with_its_probability(p):
  N = 50_000
  chosen_NE = chance.draw_experts(np.random.default_rng(3), np.array(p), N)
  each = chosen_NE.sum(1)
  assert set(each) <= {int(sum(p) + 1e-9), int(np.ceil(sum(p) - 1e-9))}
  error = 5 * np.sqrt(np.array(p) * (1 - np.array(p)) / N) + 1e-12
  assert (np.abs(chosen_NE.mean(0) - p) < error).all()


def test_even_experts_are_as_if_drawn_from_a_hat():
  """All 20 sets of three of six are as likely."""
  N = 40_000
  chosen_NE = chance.draw_experts(np.random.default_rng(4), np.full(6, 0.5), N)
  found, counts = np.unique(chosen_NE, axis=0, return_counts=True)
  assert len(found) == 20
  assert stats.chisquare(counts).pvalue > 1e-3
