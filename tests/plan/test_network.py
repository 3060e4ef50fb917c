# SPDX-License-Identifier: Apache-2.0
"""What collectives move, over which axes, and how long a torus takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.plan.chips import CHIPS
from moejax.plan.collectives import Fabric
from moejax.plan.network import Torus
from moejax.plan.program import Program
from moejax.plan.roofline import Walk

SIZES = (("fsdp", 2), ("expert", 4))


def torus(*sides, kind="TPU v5", cores=1):
  coords = tuple(tuple(map(int, c)) for c in np.ndindex(*sides))
  coords = tuple(c for c in coords for _ in range(cores))
  return Torus(CHIPS[kind], coords, sides, cores)


def collectives(function, out_spec):
  """Of a program on 2 x 4 devices, as lines of a torus of 2 x 4."""
  devices = np.asarray(jax.devices()[:8]).reshape(2, 4)
  mesh = Mesh(devices, [name for name, _ in SIZES])
  spec = PartitionSpec("fsdp", "expert")
  local = jax.shard_map(
    function, mesh=mesh, in_specs=spec, out_specs=out_spec, check_vma=False
  )
  x = jax.ShapeDtypeStruct(
    (16, 32), jnp.float32, sharding=NamedSharding(mesh, spec)
  )
  text = jax.jit(local).lower(x).compile().as_text()
  fabric = Fabric(SIZES, torus(2, 4))
  walk = Walk(Program.parse(text), fabric, 0)
  return [sent.collective for sent in walk.collectives]


PART = 8 * 8 * 4  # bytes of a device's part


@pytest.mark.parametrize("axis, size", SIZES)
def test_sums(axis, size):
  """A ring sends 2 (n - 1) / n of what it adds up."""
  (found,) = collectives(
    functools.partial(jax.lax.psum, axis_name=axis),
    PartitionSpec(*(None if a == axis else a for a, _ in SIZES)),
  )
  assert (found.kind, found.axes) == ("all-reduce", (axis,))
  assert found.bytes == pytest.approx(2 * (size - 1) / size * PART)


def test_sums_over_both():
  (found,) = collectives(
    lambda x: jax.lax.psum(x, ("fsdp", "expert")), PartitionSpec()
  )
  assert found.axes == ("fsdp", "expert")
  assert found.bytes == pytest.approx(2 * 7 / 8 * PART)


def test_gathering():
  (found,) = collectives(
    lambda x: jax.lax.all_gather(x, "expert", tiled=True) * 2,
    PartitionSpec("fsdp"),
  )
  assert (found.kind, found.axes) == ("all-gather", ("expert",))
  assert found.bytes == pytest.approx(3 * PART)


def test_exchanging():
  (found,) = collectives(
    lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True) * 2,
    PartitionSpec("fsdp", "expert"),
  )
  assert (found.kind, found.axes) == ("all-to-all", ("expert",))
  assert found.bytes == pytest.approx(3 / 4 * PART)


def test_a_ring_is_twice_as_fast_as_a_line():
  line, ring = torus(4, 4, 1, kind="TPU v5 lite"), torus(4, 4, 4)
  group = range(4)  # along a side that closes on a v5p alone
  link = CHIPS["TPU v5"].link
  assert ring.gather_seconds(group, 1e9) == pytest.approx(1e9 / (2 * link))
  link = CHIPS["TPU v5 lite"].link
  assert line.gather_seconds(group, 1e9) == pytest.approx(1e9 / link)


def test_sixteen_in_a_row_close_in_two_dimensions():
  network = torus(16, 16, 1, kind="TPU v5 lite")
  link = CHIPS["TPU v5 lite"].link
  row, whole = range(16), range(256)
  assert network.gather_seconds(row, 1e9) == pytest.approx(1e9 / (2 * link))
  assert network.gather_seconds(whole, 1e9) == pytest.approx(1e9 / (4 * link))
  narrow = torus(8, 16, 1, kind="TPU v5 lite")
  assert narrow.gather_seconds(row, 1e9) == pytest.approx(1e9 / (2 * link))


@pytest.mark.parametrize("sides", [(2, 4, 4), (2, 2, 4), (4, 4, 2)])
def test_less_than_a_cube_has_no_rings(sides):
  """The optical switches that close a side are between whole cubes."""
  link = CHIPS["TPU v5"].link
  for network in (torus(*sides), torus(*sides, kind="TPU7x")):
    group = [i for i, c in enumerate(network.coords) if c[:2] == (0, 0)]
    seconds = network.gather_seconds(group, 1e9)
    assert seconds == pytest.approx(1e9 / link)


def test_devices_of_a_chip_share_its_links_and_rates():
  chip, one, two = CHIPS["TPU7x"], torus(4, 4, 4), torus(4, 4, 4, cores=2)
  assert torus(4, 4, 4, kind="TPU7x", cores=2).rates == (
    chip.flops / 2, chip.bandwidth / 2
  )  # fmt: skip
  both, single = range(8), range(0, 8, 2)  # four chips of the last side
  assert two.gather_seconds(both, 1e9) == one.gather_seconds(range(4), 1e9)
  # The other devices are a group of their own, on the same links.
  assert two.gather_seconds(single, 1e9) == pytest.approx(
    2 * one.gather_seconds(range(4), 1e9)
  )
  assert two.hop_seconds(single, 1.0) == pytest.approx(
    2 * one.hop_seconds(range(4), 1.0)
  )
  for group in (both, single):  # each of them sends as much
    assert two.exchange_seconds(group, 1e9) == pytest.approx(
      2 * one.exchange_seconds(range(4), 1e9)
    )


def test_an_exchange_crosses_the_middle():
  """On a line of 4, each half sends half of its bytes over one link."""
  network = torus(4, kind="TPU v5 lite")
  link = CHIPS["TPU v5 lite"].link
  assert network.exchange_seconds(range(4), 1e9) == pytest.approx(
    2 * 1e9 / 2 / link
  )


def test_all_sides_of_a_torus_help():
  network = torus(4, 4, 4)
  all_of_it = network.gather_seconds(range(64), 1e9)
  assert all_of_it == pytest.approx(1e9 / (6 * CHIPS["TPU v5"].link))


@pytest.mark.parametrize(
  "groups, axes",
  [
    ("{{0,1,2,3},{4,5,6,7}}", ("expert",)),
    ("[2,4]<=[8]", ("expert",)),
    ("[4,2]<=[2,4]T(1,0)", ("fsdp",)),
    ("mesh['a'=2,'b'=4] {'b'}", ("expert",)),
    ("mesh['a'=8] {'a'}", ("fsdp", "expert")),
  ],
)
def test_notations_of_groups(groups, axes):
  text = f"""
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add
}}
"""
  fabric = Fabric(SIZES, torus(2, 4))
  (sent,) = Walk(Program.parse(text), fabric, 0).collectives
  found = sent.collective
  assert found.axes == axes


def test_a_scatter_that_blocks_is_a_fusion():
  """As the TPU's compiler writes it; each device keeps its part of the sum."""
  text = """
%all-reduce-scatter.1 (q: f32[64]) -> f32[8] {
  %q = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}
  %at = s32[] constant(0)
  ROOT %own = f32[8]{0} dynamic-slice(%sum, %at), dynamic_slice_sizes={8}
}

ENTRY %main (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %r = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
  walk = Walk(Program.parse(text), Fabric(SIZES, torus(2, 4)), 0)
  (sent,) = walk.collectives
  assert sent.collective.kind == "reduce-scatter"
  assert sent.collective.bytes == pytest.approx(7 / 8 * 64 * 4)
  assert sent.waits == pytest.approx(sent.collective.seconds)
