# SPDX-License-Identifier: Apache-2.0
"""Which attention back end is chosen, and why."""

import warnings

import jax.numpy as jnp
import pytest

from moejax.ops.attention import choose_backend

CHOICES = [
  ("cpu", "auto", 512, 64, jnp.float32, "plain"),
  ("cpu", "auto", 1 << 16, 64, jnp.float32, "blockwise"),
  ("cpu", "blockwise", 64, 64, jnp.float32, "blockwise"),
  ("tpu", "auto", 4096, 128, jnp.bfloat16, "splash"),
  ("tpu", "auto", 1024, 80, jnp.bfloat16, "splash"),
  ("tpu", "plain", 4096, 128, jnp.bfloat16, "plain"),
  ("gpu", "auto", 4096, 128, jnp.bfloat16, "cudnn"),
  ("rocm", "auto", 512, 64, jnp.bfloat16, "plain"),
]


@pytest.mark.parametrize("platform, requested, length, H, dtype, want", CHOICES)
def test_choose_backend(platform, requested, length, H, dtype, want):
  name, reason = choose_backend(
    platform, requested, seq_len=length, head_dim=H, dtype=dtype
  )
  assert name == want
  assert reason


FALLBACKS = [
  ("tpu", "auto", 1000, 128, jnp.bfloat16, "multiple of 128, not 1000"),
  ("gpu", "auto", 1024, 64, jnp.float32, "bfloat16, not float32"),
  ("gpu", "auto", 1024, 256, jnp.bfloat16, "up to 128, not 256"),
  ("gpu", "auto", 1 << 16, 64, jnp.bfloat16, "mask would be 65536 x 65536"),
  ("gpu", "cudnn", 1023, 64, jnp.bfloat16, "even length, not 1023"),
  ("cpu", "splash", 1024, 64, jnp.float32, "does not run on cpu"),
]


@pytest.mark.parametrize(
  "platform, requested, length, H, dtype, why", FALLBACKS
)
def test_fallback_warns_with_its_reason(
  platform, requested, length, H, dtype, why
):
  with pytest.warns(UserWarning, match=why):
    name, reason = choose_backend(
      platform, requested, seq_len=length, head_dim=H, dtype=dtype
    )
  assert name in ("plain", "blockwise")
  assert why in reason


def test_decoding_is_no_fallback():
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    name, reason = choose_backend(
      "tpu", "auto", seq_len=300, head_dim=64, dtype=jnp.float32, query_len=1
    )
  assert name == "plain"
  assert "cache of 300" in reason


@pytest.mark.parametrize(
  "platform, kernel", [("tpu", "splash"), ("gpu", "cudnn")]
)
def test_kernels_take_parts_of_rows(platform, kernel):
  sizes = {"seq_len": 1024, "head_dim": 64, "dtype": jnp.bfloat16}
  assert choose_backend(platform, "auto", parts=4, **sizes)[0] == kernel
  if kernel == "splash":
    with pytest.warns(UserWarning, match="multiple of 128, not 64"):
      assert (
        choose_backend(platform, "auto", parts=16, **sizes)[0] == "blockwise"
      )
