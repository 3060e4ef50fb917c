# SPDX-License-Identifier: Apache-2.0
"""Gathers in stages give what one gather gives, and the same gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from moejax.parallel import gather as gathers


class Torus:
  """What is asked of a mesh, with devices at places of a torus."""

  def __init__(self, names, sizes, sides):
    places = [types.SimpleNamespace(coords=c) for c in np.ndindex(*sides)]
    self.devices = np.empty(len(places), object)
    self.devices[:] = places
    self.devices = self.devices.reshape(sizes)
    self.axis_names, self.shape = names, dict(zip(names, sizes))


def test_two_sides_take_one_stage():
  assert gathers.stages(Torus(("x",), (16,), (4, 4, 1)), "x") == (None,)
  mesh = Torus(("x", "y"), (4, 16), (4, 4, 4))
  assert gathers.stages(mesh, "y") == (None,)


def test_three_sides_take_two():
  near, far = gathers.stages(Torus(("x",), (64,), (4, 4, 4)), "x")
  assert near[0] == (0, 1, 2, 3)
  assert far[0] == tuple(range(0, 64, 4))
  for groups in (near, far):
    assert sorted(i for group in groups for i in group) == list(range(64))


def test_devices_without_places_take_one():
  mesh = Mesh(np.asarray(jax.devices()[:8]), ("x",))
  assert gathers.stages(mesh, "x") == (None,)


@pytest.mark.parametrize("axes", [("x",), ("y",), ("x", "y")])
@pytest.mark.parametrize("dim", [0, 1])
def test_stages_change_nothing(axes, dim, monkeypatch):
  """Four places of x in two stages, as if they lay along a torus."""
  halves = ((0, 1), (2, 3)), ((0, 2), (1, 3))
  mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
  spec = [None, None, None]
  spec[dim] = axes
  whole = jax.random.normal(jax.random.key(0), (16, 8, 3))
  weight = jax.random.normal(jax.random.key(1), whole.shape)

  def loss(x, staged):
    def body(part):
      if staged:
        got = gathers.gather(part, mesh, axes, dim)
      else:
        got = jax.lax.all_gather(part, axes, axis=dim, tiled=True)
      scale = 1 + jax.lax.axis_index(("x", "y"))  # gradients differ by device
      return jax.lax.psum((got * weight).sum() * scale, ("x", "y"))

    return jax.shard_map(
      body, mesh=mesh, in_specs=PartitionSpec(*spec), out_specs=PartitionSpec(),
      check_vma=False,
    )(x)  # fmt: skip

  monkeypatch.setattr(
    gathers, "stages", lambda _, axis: halves if axis == "x" else (None,)
  )
  expected, got = (
    jax.jit(jax.value_and_grad(lambda x, staged=staged: loss(x, staged)))(whole)
    for staged in (False, True)
  )
  assert np.allclose(got[0], expected[0], rtol=1e-6)
  assert jnp.abs(expected[1]).max() > 0
  np.testing.assert_allclose(got[1], expected[1], rtol=1e-5)
