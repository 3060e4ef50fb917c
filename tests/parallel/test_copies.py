# SPDX-License-Identifier: Apache-2.0
"""A flipped bit in one device's copy is found, and its array named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.parallel import differing_copies

MESH = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))


def placed(array, *spec):
  return jax.device_put(array, NamedSharding(MESH, PartitionSpec(*spec)))


def flip(array, copy, bit):
  """The same array, but for a bit of the part on one device."""
  parts = [np.array(s.data) for s in array.addressable_shards]
  data = np.frombuffer(parts[copy].tobytes(), np.uint8).copy()
  data[bit // 8] ^= 1 << bit % 8
  parts[copy] = data.view(parts[copy].dtype).reshape(parts[copy].shape)
  devices = [s.device for s in array.addressable_shards]
  return jax.make_array_from_single_device_arrays(
    array.shape, array.sharding,
    [jax.device_put(p, d) for p, d in zip(parts, devices)],
  )  # fmt: skip


def state():
  key = jax.random.key(0)
  w = jax.random.normal(key, (8, 6))
  return {
    "half": placed(w, "fsdp"),  # two copies
    "short": placed(w.astype(jnp.bfloat16)),  # four
    "count": placed(jnp.int32(7)),
    "one": placed(w, ("data", "fsdp")),  # none
    "rng": placed(key),
    "local": w,
  }


def test_equal_copies_are_equal():
  assert differing_copies(state()) == []
  assert differing_copies({"local": jnp.ones(3)}) == []


@pytest.mark.parametrize("name", ["half", "short", "count"])
def test_any_bit_of_any_copy(name):
  rng = np.random.default_rng(0)
  for copy in range(4):
    found = state()
    bits = 8 * found[name].addressable_shards[copy].data.nbytes
    found[name] = flip(found[name], copy, int(rng.integers(bits)))
    assert differing_copies(found) == [name]
