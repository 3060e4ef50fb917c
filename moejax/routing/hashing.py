# SPDX-License-Identifier: Apache-2.0
"""Fixed random numbers of integers, the same in every program and batch."""

import jax
import jax.numpy as jnp

Array = jax.Array


def hash_scores(E: int, seed: int, *integers_T: Array) -> Array:
  """Numbers in [0, 1) for each token and expert, [T, E].

  A token's row depends on its integers and the seed alone.
  """
  number_T = jnp.full(integers_T[0].shape, seed, jnp.uint32)
  for x_T in integers_T:
    number_T = _mix(number_T ^ x_T.astype(jnp.uint32))
  number_TE = _mix(number_T[:, None] ^ jnp.arange(E, dtype=jnp.uint32)[None])
  return (number_TE >> 8).astype(jnp.float32) / 2.0**24


def _mix(x: Array) -> Array:
  """Spreads each bit over all: MurmurHash3's finalizer (Appleby 2011).

  Of the next number, so that 0 is not kept.
  """
  x = x + jnp.uint32(0x9E3779B9)
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
