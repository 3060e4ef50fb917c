# SPDX-License-Identifier: Apache-2.0
"""Steps that are not taken: non-finite ones, and spikes where one looks.

A step that is not taken changes nothing but this guard's counts: no parameter,
no moment, no average, no balancing bias, and not the window that spikes are
told by. So one NaN is one step lost, and a resumed run decides as an unbroken
one.
"""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

from moejax.config import StabilityConfig

Array = jax.Array

TAKEN, NOT_FINITE, SPIKE = 0, 1, 2
REASONS = {NOT_FINITE: "its loss or gradient is not finite", SPIKE: "a spike"}


@flax.struct.dataclass
class Guard:
  """What is known of the steps so far.

  Attributes:
    skipped: int32, steps not taken.
    in_a_row: int32, the last ones of them without a taken one between.
    taken: int32, steps taken since the window began.
    loss_W, norm_W: losses and gradient norms of the last taken steps, a ring;
      None if spikes are not looked for.
  """

  skipped: Array
  in_a_row: Array
  taken: Array
  loss_W: Array | None = None
  norm_W: Array | None = None

  @classmethod
  def fresh(cls, config: StabilityConfig) -> Self:
    zero = jnp.zeros((), jnp.int32)
    if not config.spike:
      return cls(zero, zero, zero)
    zeros_W = jnp.zeros(config.window, jnp.float32)
    return cls(zero, zero, zero, zeros_W, zeros_W)

  def anew(self, when: Array) -> Self:
    """With an empty window where `when` is true.

    Losses and norms of other text or other weights are on another level, and a
    window of the old one would call every step a spike.
    """
    return self.replace(taken=jnp.where(when, 0, self.taken))

  def verdict(self, config: StabilityConfig, loss: Array, norm: Array) -> Array:
    """int32: TAKEN, NOT_FINITE or SPIKE.

    A spike is a loss or a gradient norm more than `config.spike` standard
    deviations above the mean of the window, once that is half full (OLMo-core's
    rule). What is not finite is no spike.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    spike = jnp.zeros((), bool)
    if config.spike:
      above = jnp.stack([
        value > mean + config.spike * deviation
        for value, (mean, deviation) in (
          (loss, self._moments(self.loss_W)), (norm, self._moments(self.norm_W))
        )
      ])  # fmt: skip
      spike = above.any() & (2 * self.taken >= self.loss_W.shape[0])
    return jnp.where(finite, jnp.where(spike, SPIKE, TAKEN), NOT_FINITE)

  def after(self, verdict: Array, loss: Array, norm: Array) -> Self:
    """The counts and the window after a step."""
    taken = verdict == TAKEN

    def append(ring_W, value):
      if ring_W is None:
        return None
      at = self.taken % ring_W.shape[0]
      return jnp.where(taken, ring_W.at[at].set(value), ring_W)

    return Guard(
      skipped=self.skipped + ~taken,
      in_a_row=jnp.where(taken, 0, self.in_a_row + 1),
      taken=self.taken + taken,
      loss_W=append(self.loss_W, loss),
      norm_W=append(self.norm_W, norm),
    )

  def _moments(self, ring_W: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of what the ring holds."""
    W = ring_W.shape[0]
    known_W = jnp.arange(W) < self.taken
    count = jnp.maximum(jnp.minimum(self.taken, W), 1)
    mean = jnp.where(known_W, ring_W, 0.0).sum() / count
    squares = jnp.where(known_W, (ring_W - mean) ** 2, 0.0).sum()
    return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1))
