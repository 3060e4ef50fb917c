# SPDX-License-Identifier: Apache-2.0
"""What compilers are asked, and one that does not know it."""

import jax
import jax.numpy as jnp
import pytest

from moejax.parallel import overlap
from moejax.plan.topology import devices_of


def test_kernels_are_the_difference():
  everything = overlap.options_of("tpu", "kernels")
  less = overlap.options_of("tpu", "other")
  (extra,) = everything.keys() - less.keys()
  assert "mosaic_custom_call" in extra
  assert overlap.options_of("tpu", "none") == {}
  assert overlap.options_of("cpu", "kernels") == {}


@pytest.mark.tpu
def test_what_a_compiler_does_not_know_is_left_out(monkeypatch):
  pytest.importorskip("libtpu", reason="the [plan] extra is not installed")
  monkeypatch.setitem(overlap.TPU_OPTIONS, "xla_no_such_thing", "true")
  where = jax.sharding.SingleDeviceSharding(devices_of("v5e:2x2")[0])
  x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=where)
  with pytest.warns(UserWarning, match="no xla_no_such_thing"):
    compiled = overlap.compile_overlapped(
      jax.jit(jnp.sin).lower(x), "tpu", "kernels"
    )
  assert "sine" in compiled.as_text()
