# SPDX-License-Identifier: Apache-2.0
"""Which row of which source is global row `i`: in closed form, for any `i`.

Sources are the leaves of a binary tree. A node's rows go to its two children in
the proportion of their weights, the count of the first child being rounded to
the nearest row, so row `i` is found by walking down once, without randomness or
state. Over any prefix of a phase each source has its exact share of rows, give
or take one (proven for up to four sources; below 1.5 for up to eight).
"""

import bisect
import dataclasses
import fractions
import itertools
import math
import sys
from collections.abc import Sequence

# Of this many sources at most all trees are compared.
_SEARCHED = 8


@dataclasses.dataclass(frozen=True)
class _Node:
  """Sources that share `weight`; a leaf has a source, others two children."""

  weight: int
  source: int = -1
  first: "_Node | None" = None
  second: "_Node | None" = None


@dataclasses.dataclass(frozen=True)
class _Phase:
  start: int  # first global row
  root: _Node
  taken: tuple[int, ...]  # rows of each source before `start`


class Mixture:
  """A map from global row to (source, row of that source, counted from 0).

  Args:
    phases: (first global row, weights of the sources) in order, the first at 0.
      A weight of 0 leaves a source out. No row repeats or is skipped where the
      weights change.
  """

  def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]):
    if not phases or phases[0][0] != 0:
      raise ValueError("the first phase must start at row 0")
    self._num_sources = len(phases[0][1])
    self._phases: list[_Phase] = []
    taken = (0,) * self._num_sources
    for number, (start, weights) in enumerate(phases):
      if len(weights) != self._num_sources:
        raise ValueError(f"phase {number} has {len(weights)} weights")
      if self._phases:
        if start <= self._phases[-1].start:
          raise ValueError(f"phase {number} starts before the one before it")
        taken = self.counts(start)
      self._phases.append(_Phase(start, _tree(weights), taken))

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, row: int) -> tuple[int, int]:
    phase = self._phase_of(row)
    node, index = phase.root, row - phase.start
    while node.source < 0:
      first = _share(node, index)
      if _share(node, index + 1) > first:
        node, index = node.first, first
      else:
        node, index = node.second, index - first
    return node.source, phase.taken[node.source] + index

  def counts(self, rows: int) -> tuple[int, ...]:
    """How many of the first `rows` global rows come from each source."""
    phase = self._phase_of(max(0, rows - 1))
    counts = list(phase.taken)
    todo = [(phase.root, rows - phase.start)]
    while todo:
      node, count = todo.pop()
      if node.source >= 0:
        counts[node.source] += count
      else:
        first = _share(node, count)
        todo += [(node.first, first), (node.second, count - first)]
    return tuple(counts)

  def _phase_of(self, row: int) -> _Phase:
    return next(p for p in reversed(self._phases) if row >= p.start)


def first_beyond(
  mixture: Mixture, source: int, size: int, rows: int
) -> int | None:
  """The first of `rows` global rows that wants row `size` of a source."""
  if mixture.counts(rows)[source] <= size:
    return None
  taken = lambda row: mixture.counts(row + 1)[source]
  return bisect.bisect_right(range(rows), size, key=taken)


def without_exhausted(
  stretches: Sequence[tuple[int, Sequence[float]]],
  sizes: Sequence[int],
  rows: int,
) -> list[tuple[int, tuple[float, ...]]]:
  """The stretches of a mixture, sources left out once all their rows are read.

  Args:
    stretches: as `Mixture` takes them.
    sizes: rows of each source.
    rows: global rows that will be read.

  Raises:
    ValueError: no source is left before the last row; its `args` are a message
      and that row.
  """
  found = [(start, tuple(weights)) for start, weights in stretches]
  while True:
    mixture = Mixture(found)
    ends = [
      (row, source)
      for source, size in enumerate(sizes)
      if (row := first_beyond(mixture, source, size, rows)) is not None
    ]
    if not ends:
      return found
    cut, source = min(ends)
    (at_cut,) = [w for start, w in found if start <= cut][-1:]
    later = [(cut, at_cut), *((s, w) for s, w in found if s > cut)]
    later = [(s, (*w[:source], 0.0, *w[source + 1 :])) for s, w in later]
    for start, weights in later:
      if not any(weights):
        raise ValueError("no source is left", start)
    found = [(s, w) for s, w in found if s < cut] + later


def _share(node: _Node, count: int) -> int:
  """Rows of the first child among the node's first `count`."""
  return (2 * count * node.first.weight + node.weight) // (2 * node.weight)


def _tree(weights: Sequence[float]) -> _Node:
  """The tree in which roundings add up least; exact integer weights."""
  exact = [fractions.Fraction(repr(weight)) for weight in weights]
  if min(exact) < 0 or sum(exact) == 0:
    raise ValueError(f"weights {tuple(weights)} must be >= 0 and not all zero")
  scale = math.lcm(*(weight.denominator for weight in exact))
  leaves = [
    _Node(int(weight * scale), source)
    for source, weight in enumerate(exact)
    if weight > 0
  ]
  leaves.sort(key=lambda leaf: (-leaf.weight, leaf.source))
  return _split(tuple(leaves), 0.0)[1]


def _split(leaves: tuple[_Node, ...], above: float) -> tuple[float, _Node]:
  """(bound, tree) of leaves sorted by weight, the smallest bound there is.

  A rounding by half a row at an ancestor of weight W reaches a leaf of weight w
  as w/W of it; `above` is the sum of 1/W over the ancestors below the root.
  """
  if len(leaves) == 1:
    return leaves[0].weight * above, leaves[0]
  weight = sum(leaf.weight for leaf in leaves)
  cuts = range(1, len(leaves))
  if len(leaves) > _SEARCHED:
    sums = list(itertools.accumulate(leaf.weight for leaf in leaves))
    cuts = (min(cuts, key=lambda cut: abs(weight - 2 * sums[cut - 1])),)
  best = None
  for cut in cuts:
    halves = [
      _split(half, above + 1 / sum(leaf.weight for leaf in half))
      if len(half) > 1
      else _split(half, above)
      for half in (leaves[:cut], leaves[cut:])
    ]
    bound = max(halves[0][0], halves[1][0])
    if best is None or bound < best[0]:
      best = bound, _Node(weight, -1, halves[0][1], halves[1][1])
  return best
