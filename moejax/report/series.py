# SPDX-License-Identifier: Apache-2.0
"""Smoothing and thinning of curves; NaN marks what is missing."""

from collections.abc import Callable

import numpy as np

MAX_POINTS = 800


def finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The points that can be drawn."""
  keep = np.isfinite(y)
  return x[keep], y[keep]


def smooth(
  x: np.ndarray, y: np.ndarray, reduce: Callable = np.mean
) -> tuple[np.ndarray, np.ndarray]:
  """Mean (or `reduce`) over a thirtieth of the run around, at least 5 points.

  Windows are centred, because a trailing mean shows every turn too late. At the
  start, where loss curves are steep, they shrink to both sides alike; at the
  end only their far side does.
  """
  x, y = finite(x, y)
  half = max(5, len(y) // 30) // 2
  centres = np.unique(
    np.linspace(0, max(0, len(y) - 1), min(len(y), MAX_POINTS // 2)).astype(int)
  )
  means = [reduce(y[max(0, c - half) : c + min(c, half) + 1]) for c in centres]
  return x[centres], np.array(means, float)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """At most about MAX_POINTS points; the extremes of each bucket stay.

  Every n-th point of a long run would hide its spikes, and those are what a
  reader of a loss curve looks for.
  """
  x, y = finite(x, y)
  if len(x) <= MAX_POINTS:
    return x, y
  keep = {0, len(y) - 1}
  for bucket in np.array_split(np.arange(len(y)), MAX_POINTS // 2):
    keep |= {bucket[y[bucket].argmin()], bucket[y[bucket].argmax()]}
  kept = np.array(sorted(keep))
  return x[kept], y[kept]


def bin_loads(
  steps: np.ndarray, loads_SLE: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
  """Loads on an even grid of steps, for a picture.

  Args:
    steps: [S], increasing, maybe uneven.
    loads_SLE: load at each.
    most: columns at most.

  Returns:
    Edges of the columns in steps, [N + 1], and loads [N, L, E]: the mean of the
    records in a column, or the record nearest to it if there is none.
  """
  if len(steps) == 1:
    return np.array([steps[0] - 0.5, steps[0] + 0.5]), loads_SLE.copy()
  count = int(min(most, steps[-1] - steps[0] + 1))
  edges = np.linspace(steps[0], steps[-1], count + 1)
  column = np.clip(np.searchsorted(edges, steps, "right") - 1, 0, count - 1)
  out = np.empty((count, *loads_SLE.shape[1:]))
  for n in range(count):
    inside = column == n
    if not inside.any():
      centre = (edges[n] + edges[n + 1]) / 2
      inside = [np.abs(steps - centre).argmin()]
    out[n] = loads_SLE[inside].mean(0)
  return edges, out
