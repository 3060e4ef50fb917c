# SPDX-License-Identifier: Apache-2.0
"""Rows to the devices that hold their experts, and back.

Rows lie sorted by expert. Each device learns all counts, and from them where
every row lands: at its receiver again sorted by expert, then by sender, so no
one sorts or moves rows a second time. `send` and `receive` are each other's
transposes, which is how each is differentiated.
"""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

AXIS = "expert"


@flax.struct.dataclass
class Plan:
  """Who sends how many rows of which expert to where. P devices, E experts.

  Attributes:
    sizes_E: rows of each expert here, as they lie sorted.
    lands_E: where the first of them lands at its receiver.
    arrives_PE: rows that come from each device for each expert held here.
    lies_PE: where the first of them lies.
    room: rows of the buffer for what arrives.
    rows: rows here, those of no expert included.
    native: whether the platform has `ragged_all_to_all`.
  """

  sizes_E: Array
  lands_E: Array
  arrives_PE: Array
  lies_PE: Array
  room: int = flax.struct.field(pytree_node=False)
  rows: int = flax.struct.field(pytree_node=False)
  native: bool = flax.struct.field(pytree_node=False)

  @classmethod
  def make(
    cls, sizes_E: Array, size: int, rows: int, room: int, native: bool
  ) -> Self:
    """The same plan on all devices, each with its own part of it.

    Args:
      sizes_E: rows of each expert here; there must be room for all.
      size: devices.
      rows, room, native: as the attributes.
    """
    here = sizes_E.shape[0] // size
    me = jax.lax.axis_index(AXIS)
    counts = _all_counts(sizes_E, size)
    starts = _starts(counts)
    return cls(
      sizes_E=sizes_E,
      lands_E=starts[me].reshape(size * here),
      arrives_PE=counts[:, me],
      lies_PE=starts[:, me],
      room=room,
      rows=rows,
      native=native,
    )

  @property
  def received_E(self) -> Array:
    """Rows of each expert held here, from all devices."""
    return self.arrives_PE.sum(0)

  @property
  def starts_E(self) -> Array:
    """Where each expert's rows begin here."""
    return jnp.cumsum(self.sizes_E) - self.sizes_E


def admitted(sizes_E: Array, size: int, room: int) -> Array:
  """How many rows of each expert here a receiver has room for."""
  counts = _all_counts(sizes_E, size)
  kept = jnp.clip(room - _starts(counts), 0, counts)
  return kept[jax.lax.axis_index(AXIS)].reshape(-1)


def _all_counts(sizes_E: Array, size: int) -> Array:
  """Rows by sender, receiver and expert of the receiver."""
  return jax.lax.all_gather(sizes_E, AXIS).reshape(size, size, -1)


def _starts(counts: Array) -> Array:
  """Where each of them begins at the receiver: by expert, then by sender."""
  size, _, here = counts.shape
  by_expert = jnp.moveaxis(counts, 0, 2).reshape(size, here * size)
  starts = jnp.cumsum(by_expert, axis=1) - by_expert
  return jnp.moveaxis(starts.reshape(size, here, size), 2, 0)


@jax.custom_vjp
def send(plan: Plan, x_AD: Array) -> Array:
  """Rows at their experts' devices, [room, D]; zeros beyond what came."""
  if plan.native:
    return jax.lax.ragged_all_to_all(
      x_AD, _zeros(plan.room, x_AD), plan.starts_E, plan.sizes_E, plan.lands_E,
      plan.arrives_PE.reshape(-1), axis_name=AXIS,
    )  # fmt: skip
  boxes = _exchange(_take(x_AD, _rows_to_send(plan)))
  return _put(boxes, _rows_that_came(plan), plan.room)


@jax.custom_vjp
def receive(plan: Plan, y_CD: Array) -> Array:
  """The way back, [rows, D]; zeros for rows of no expert."""
  if plan.native:
    # What came from a device goes back to where its rows of the expert lie.
    begin_PE = _exchange(plan.starts_E.reshape(plan.arrives_PE.shape))
    return jax.lax.ragged_all_to_all(
      y_CD, _zeros(plan.rows, y_CD), plan.lies_PE.reshape(-1),
      plan.arrives_PE.reshape(-1), begin_PE.reshape(-1), plan.sizes_E,
      axis_name=AXIS,
    )  # fmt: skip
  boxes = _exchange(_take(y_CD, _rows_that_came(plan)))
  return _put(boxes, _rows_to_send(plan), plan.rows)


def _send_fwd(plan, x_AD):
  return send(plan, x_AD), plan


def _send_bwd(plan, d_CD):
  return None, receive(plan, d_CD)


def _receive_fwd(plan, y_CD):
  return receive(plan, y_CD), plan


def _receive_bwd(plan, d_AD):
  return None, send(plan, d_AD)


send.defvjp(_send_fwd, _send_bwd)
receive.defvjp(_receive_fwd, _receive_bwd)


def _exchange(boxes: Array) -> Array:
  """Box p goes to device p; box p of the result came from device p."""
  return jax.lax.all_to_all(boxes, AXIS, 0, 0)


def _zeros(rows: int, like: Array) -> Array:
  return jnp.zeros((rows, *like.shape[1:]), like.dtype)


# Without a ragged exchange each pair of devices exchanges a box that has room
# for all rows of a device: exact, and as slow as that sounds.


def _rows_to_send(plan: Plan) -> Array:
  """The row here of each place in the boxes, [P, rows]; `rows` for none."""
  place = jnp.arange(plan.rows)[None]
  first_P = plan.starts_E.reshape(plan.arrives_PE.shape)[:, :1]
  filled_P = plan.sizes_E.reshape(plan.arrives_PE.shape).sum(1)[:, None]
  return jnp.where(place < filled_P, first_P + place, plan.rows)


def _rows_that_came(plan: Plan) -> Array:
  """The row there of each place in the boxes, [P, rows]; `room` for none."""
  place = jnp.arange(plan.rows)[None, :, None]
  ends = jnp.cumsum(plan.arrives_PE, axis=1)[:, None]
  begins = ends - plan.arrives_PE[:, None]
  lies = plan.lies_PE[:, None]
  inside = (place >= begins) & (place < ends)
  row = jnp.where(inside, lies + place - begins, 0).sum(-1)
  return jnp.where(inside.any(-1), row, plan.room)


def _take(rows: Array, index: Array) -> Array:
  return rows.at[index].get(mode="fill", fill_value=0)


def _put(boxes: Array, index: Array, size: int) -> Array:
  flat = boxes.reshape(-1, *boxes.shape[2:])
  return _zeros(size, flat).at[index.reshape(-1)].set(flat, mode="drop")
