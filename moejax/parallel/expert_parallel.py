# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism: one more dispatch, over devices that hold experts apart.

Called by each device of the mesh axis `expert` on its own tokens, with the
weights of its own experts. Either rows go to where they are wanted and back
(`all_to_all`), or all tokens go everywhere and partial sums come back
(`all_gather`). Both compute what one device with all experts would.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.dispatch.ragged import (
  gather_rows,
  return_rows,
  sort_by_expert,
  sorted_weights,
)
from moejax.ops.residuals import EXCHANGED, checkpoint_name
from moejax.parallel.exchange import AXIS, Plan, admitted, receive, send
from moejax.routing import Routing

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ExpertParallel:
  """A dispatch over `size` devices.

  Attributes:
    inner: the dispatch on one device.
    size: devices of the axis.
    num_experts: E of the model, `size` times those of a device.
    exchange: all_to_all or all_gather.
    receive_factor: rows that a device has room for, over those it sends; 0 for
      all that could come.
    native: whether the platform has `ragged_all_to_all`.
  """

  inner: Callable[..., Array]
  size: int
  num_experts: int
  exchange: str
  receive_factor: float
  native: bool

  def __call__(
    self,
    expert_fn: Callable[..., Array],
    weights: Any,
    x_TD: Array,
    routing: Routing,
    combine: bool = True,
  ) -> Array:
    """As any dispatch; `routing` names experts of all devices."""
    if self.exchange == "all_gather":
      return self._gathered(expert_fn, weights, x_TD, routing, combine)
    rows_AD, sorting = gather_rows(x_TD, routing)
    plan = self._plan(sorting.sizes_E, routing)
    got_CD = checkpoint_name(send(plan, rows_AD), EXCHANGED)
    scale_C = None
    if combine:
      scale_C = send(plan, sorted_weights(sorting, routing)[:, None])[:, 0]
      scale_C = checkpoint_name(scale_C, EXCHANGED)
    y_CD = expert_fn(got_CD, plan.received_E, weights, scale_C)
    y_AD = checkpoint_name(receive(plan, y_CD), EXCHANGED)
    return return_rows(y_AD, sorting, routing, x_TD.shape[0], combine)

  def admit(self, routing: Routing) -> Routing:
    """Assignments beyond a receiver's room go nowhere, the last ones first.

    With `receive_factor` 0 there is room for all, as long as a token names an
    expert once.
    """
    if self.exchange == "all_gather" or not self._may_overflow(routing):
      return routing
    E = self.num_experts
    sorting = sort_by_expert(routing.expert_A, E)
    sizes_E = sorting.sizes_E
    kept_E = admitted(sizes_E, self.size, self.room(routing))
    # Nowhere is one more expert, with room for nothing.
    starts_E, kept_E = (
      jnp.pad(x, (0, 1)) for x in (jnp.cumsum(sizes_E) - sizes_E, kept_E)
    )
    rank_A = sorting.place_A - starts_E[routing.expert_A]
    fits_A = rank_A < kept_E[routing.expert_A]
    wanted_A = routing.wanted_A
    if wanted_A is None:
      wanted_A = routing.expert_A
    return routing.replace(
      expert_A=jnp.where(fits_A, routing.expert_A, E),
      weight_A=jnp.where(fits_A, routing.weight_A, 0.0),
      wanted_A=wanted_A,
    )

  def room(self, routing: Routing) -> int:
    """Rows that a device may receive."""
    A = routing.expert_A.shape[0]
    if self.receive_factor:
      return min(-int(-self.receive_factor * A // 1), self.size * A)
    return self.size * self._most(routing)

  def _most(self, routing: Routing) -> int:
    """Rows that one device can send to another."""
    A, X = routing.expert_A.shape[0], routing.experts_per_token
    here = self.num_experts // self.size
    return A // X * min(X, here) if X else A

  def _may_overflow(self, routing: Routing) -> bool:
    A = routing.expert_A.shape[0]
    return bool(self.receive_factor) or self._most(routing) < A

  def _plan(self, sizes_E: Array, routing: Routing) -> Plan:
    return Plan.make(
      sizes_E, self.size, routing.expert_A.shape[0], self.room(routing),
      self.native,
    )  # fmt: skip

  def _gathered(self, expert_fn, weights, x_TD, routing, combine):
    """All tokens of the group here, own experts only, then summed back."""
    T, here = x_TD.shape[0], self.num_experts // self.size
    gather = lambda x: jax.lax.all_gather(x, AXIS, tiled=True)
    first = jax.lax.axis_index(AXIS) * here
    expert_A = gather(routing.expert_A)
    mine_A = (expert_A >= first) & (expert_A < first + here)
    owner_S = jnp.repeat(
      jnp.arange(self.size, dtype=jnp.int32), routing.token_A.shape[0]
    )
    everyone = Routing(
      token_A=gather(routing.token_A) + owner_S * T,
      expert_A=jnp.where(mine_A, expert_A - first, here),
      weight_A=gather(routing.weight_A),
      logits_TE=jnp.zeros((self.size * T, here), jnp.float32),  # for its shape
      experts_per_token=routing.experts_per_token,
      capacity=routing.capacity * self.size,
    )
    y = self.inner(expert_fn, weights, gather(x_TD), everyone, combine)
    return jax.lax.psum_scatter(y, AXIS, tiled=True)
