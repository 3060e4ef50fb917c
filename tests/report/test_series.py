# SPDX-License-Identifier: Apache-2.0
"""Smoothing, thinning and binning keep what a reader looks for."""

import numpy as np
import pytest

from moejax.report.series import MAX_POINTS, bin_loads, smooth, thin


def test_smoothing_a_line_gives_the_line_but_for_the_end():
  x = np.arange(1, 1001)
  xs, ys = smooth(x, 3.0 * x)
  half = (1000 // 30) // 2
  inner = xs <= 1000 - half
  np.testing.assert_allclose(ys[inner], 3.0 * xs[inner])
  assert xs[0] == 1 and xs[-1] == 1000 and len(xs) <= MAX_POINTS


def test_smoothing_averages_noise_and_skips_nan():
  rng = np.random.default_rng(0)
  y = 5.0 + rng.normal(size=2000)
  y[100:120] = np.nan
  xs, ys = smooth(np.arange(2000), y)
  assert np.isfinite(ys).all()
  assert np.abs(ys[20:] - 5.0).max() < 0.6
  assert not ((xs >= 100) & (xs < 120)).any()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_smoothing_few_points(count):
  xs, ys = smooth(np.arange(count), np.ones(count))
  assert len(xs) == len(ys) == count


def test_median_ignores_a_pause():
  y = np.full(100, 10.0)
  y[50] = 0.001
  _, means = smooth(np.arange(100), y)
  _, medians = smooth(np.arange(100), y, np.median)
  assert means.min() < 9 and medians.min() == 10.0


def test_thinning_keeps_spikes_and_ends():
  y = np.ones(100_000)
  y[31_415], y[77_777] = 50.0, -7.0
  x, thinned = thin(np.arange(100_000), y)
  assert len(x) <= MAX_POINTS + 2
  assert thinned.max() == 50.0 and thinned.min() == -7.0
  assert x[0] == 0 and x[-1] == 99_999 and (np.diff(x) > 0).all()
  assert x[thinned.argmax()] == 31_415


def test_bins_average_and_fill_gaps_with_the_nearest():
  steps = np.array([1, 10, 20, 100])
  loads = np.array([1.0, 2.0, 3.0, 9.0])[:, None, None]
  edges, binned = bin_loads(steps, loads, most=4)
  np.testing.assert_allclose(edges, np.linspace(1, 100, 5))
  # 1, 10 and 20 fall into the first column; the next two are nearest to 20 and
  # 100 by their middles.
  np.testing.assert_allclose(binned[:, 0, 0], [2.0, 3.0, 9.0, 9.0])


def test_few_records_keep_their_values_over_their_own_span():
  steps = np.array([1, 10, 20])
  loads = np.array([1.0, 2.0, 3.0])[:, None, None]
  _, binned = bin_loads(steps, loads, most=240)
  values, counts = np.unique(binned, return_counts=True)
  assert values.tolist() == [1.0, 2.0, 3.0]
  assert counts.sum() == 20 and counts.tolist() == [5, 10, 5]


def test_one_record_is_one_column_around_its_step():
  edges, binned = bin_loads(np.array([7]), np.ones((1, 2, 3)), most=240)
  assert edges.tolist() == [6.5, 7.5] and binned.shape == (1, 2, 3)
