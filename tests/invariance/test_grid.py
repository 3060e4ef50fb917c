# SPDX-License-Identifier: Apache-2.0
"""Results do not depend on mesh, accumulation, remat or dispatch.

Each cell runs all routers and is compared with one device that computes every
expert on every token in float32. `make test` runs a slice of it, `make
test-grid` all.
"""

import itertools

import pytest

from tests.invariance.cells import (
  ANY,
  EXPERT_CHOICE,
  MESHES,
  SWITCH,
  Cell,
  errors,
  outcomes,
  reference,
)

TOLERANCE = 2e-5  # relative, of each leaf's norm, all in float32

OPTIONS = list(itertools.product((1, 4), ("none", "full"), ("dense", "ragged")))
# Half of them for each mesh, so that all pairs of options meet on each, and all
# triples on one mesh or its neighbour.
WAYS = [
  Cell(mesh, *way)
  for m, mesh in enumerate(MESHES)
  for w, way in enumerate(OPTIONS)
  if (w.bit_count() + m) % 2 == 0
]
OTHERS = [
  (EXPERT_CHOICE, "ragged"), (EXPERT_CHOICE, "padded"), (SWITCH, "padded"),
]  # fmt: skip
GRID = WAYS + [
  Cell("ep4", dispatch="ragged", exchange="all_gather"),
  Cell("fsdp2-ep2-tp2", dispatch="ragged", exchange="all_gather"),
  *(
    Cell(mesh, 4, "full", OTHERS[m % 3][1], router=OTHERS[m % 3][0])
    for m, mesh in enumerate(MESHES)
  ),
]
# Each mesh at least once.
SLICE = [
  Cell("dp2", 4, "none", "ragged"),
  Cell("fsdp4", 1, "full", "dense"),
  Cell("ep2", 1, "full", "ragged", "all_gather"),
  Cell("ep8", 1, "none", "ragged"),
  Cell("dp2-ep4", 1, "full", "ragged"),
  Cell("ep2-tp2", 1, "none", "ragged"),
  Cell("fsdp2-ep2-tp2", 4, "full", "ragged"),
  Cell("sequence2", 1, "full", "ragged"),
  Cell("ep4", 1, "none", "ragged", router=EXPERT_CHOICE),
  Cell("dp2-ep4", 1, "none", "padded", router=SWITCH),
]


def name_of(cell):
  router = "any" if cell.router == ANY else cell.router.partition("(")[0]
  return (
    f"{cell.mesh}-{cell.accumulation}-{cell.remat}-{cell.dispatch}-"
    f"{cell.exchange}-{router}"
  )


def check(cell):
  want = reference(cell.router)
  for router, got in outcomes(cell).items():
    found = errors(got, want[router])
    assert max(found.values()) < TOLERANCE, (router, found)


QUICK = ("dp2-ep4", "sequence2")


@pytest.mark.parametrize(
  "cell",
  [
    pytest.param(cell, marks=[] if cell.mesh in QUICK else pytest.mark.slow)
    for cell in SLICE
  ],
  ids=name_of,
)
def test_slice(cell):
  check(cell)


@pytest.mark.grid
@pytest.mark.parametrize("cell", GRID, ids=name_of)
def test_grid(cell):
  check(cell)


def test_the_grid_has_every_pair():
  ways = {(c.mesh, c.accumulation, c.remat, c.dispatch) for c in WAYS}
  assert len(ways) == 4 * len(MESHES)
  for i, j in itertools.combinations(range(3), 2):
    pairs = {(way[0], way[1 + i], way[1 + j]) for way in ways}
    assert len(pairs) == 4 * len(MESHES)


def test_the_slice_has_every_mesh():
  assert {cell.mesh for cell in SLICE} | {"one"} == set(MESHES)


def test_other_results_are_seen():
  """The comparison is sharp, and the routers are not the same one."""
  runs = reference(ANY)
  got = runs["top_k"]
  assert errors((got[0] * (1 + 1e-4), *got[1:]), got)["values"] > TOLERANCE
  for name, other in runs.items():
    found = errors(got, other)
    assert (max(found.values()) > 100 * TOLERANCE) == (name != "top_k"), name
