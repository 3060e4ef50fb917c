# SPDX-License-Identifier: Apache-2.0
"""`models.placement` on a mesh: local functions in one `shard_map` each."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.errors import ConfigError
from moejax.models.placement import Axes, OneDevice, Partial
from moejax.parallel import batches, expert_parallel, rules
from moejax.parallel.gather import gather
from moejax.routing import Routing

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class OnMesh(OneDevice):
  """Arrays split over a mesh by `parallel.rules`."""

  mesh: Mesh
  experts: expert_parallel.ExpertParallel | None

  def reader(self, batch_size: int) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Processes whose devices hold the same rows read the same."""
    places = batches.rows_of_processes(self.mesh, batch_size)
    distinct = sorted(set(places))
    if sum(map(len, distinct)) != batch_size:
      raise ConfigError(
        "parallel: some processes would share a part of their rows; make "
        "data * fsdp * expert a multiple or a divisor of the number of "
        f"processes, {jax.process_count()}"
      )
    return distinct.index(places[jax.process_index()]), tuple(distinct)

  def sum_over_readers(self, value: float) -> float:
    return batches.sum_over_readers(self.mesh, value)

  def sharding(self, axes: Axes) -> NamedSharding:
    return NamedSharding(self.mesh, rules.used(axes))

  def put(self, rows: np.ndarray, axes: Axes) -> Array:
    return batches.to_global(rows, self.sharding(axes))

  def parts(self, axis: str) -> int:
    return math.prod(self.mesh.shape[m] for m in rules.USED[axis])

  def constrain(self, x: Array, axes: Axes) -> Array:
    return jax.lax.with_sharding_constraint(x, self.sharding(axes))

  def local(
    self, function: Callable[..., Any], in_axes: Any, out_axes: Any
  ) -> Callable[..., Any]:
    def body(*args):
      whole = jax.tree.map(self._enter, in_axes, args, is_leaf=_is_axes)
      return jax.tree.map(
        self._leave, out_axes, function(*whole), is_leaf=_is_axes
      )

    out_specs = jax.tree.map(
      lambda x: rules.used(x.axes if isinstance(x, Partial) else x),
      out_axes, is_leaf=_is_axes,
    )  # fmt: skip
    in_specs = jax.tree.map(rules.stored, in_axes, is_leaf=_is_axes)
    # Replication is not tracked by types: kernels and loops know nothing of it.
    return jax.shard_map(
      body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs,
      check_vma=False,
    )  # fmt: skip

  def admit(self, routing: Routing) -> Routing:
    return self.experts.admit(routing) if self.experts else routing

  def _enter(self, axes: Axes, part: Any) -> Any:
    """Parts that are stored but not used apart are gathered."""
    for dim, (kept, wanted) in enumerate(
      zip(rules.stored(axes), rules.used(axes))
    ):
      extra = rules.mesh_axes(kept)[len(rules.mesh_axes(wanted)) :]
      extra = tuple(m for m in extra if self.mesh.shape[m] > 1)
      if extra:
        whole = functools.partial(gather, mesh=self.mesh, axes=extra, dim=dim)
        part = jax.tree.map(whole, part)
    return part

  def _leave(self, axes: Axes | Partial, part: Any) -> Any:
    """Partial sums are added up."""
    if not isinstance(axes, Partial):
      return part
    over = {m for name in axes.over for m in rules.USED[name]}
    over = tuple(m for m in self.mesh.axis_names if m in over)
    over = tuple(m for m in over if self.mesh.shape[m] > 1)
    if not over:
      return part
    size = math.prod(self.mesh.shape[m] for m in over)
    return jax.tree.map(lambda x: _add_up(over, size, x), part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _add_up(axes: tuple[str, ...], size: int, x: Array) -> Array:
  """The sum over mesh axes, of a result that is then the same along them."""
  del size
  return jax.lax.psum(x, axes)


def _add_up_fwd(axes, size, x):
  return _add_up(axes, size, x), None


def _add_up_bwd(axes, size, _, dy):
  # The gradient of a replicated result comes in as equal shares. Autodiff
  # would add them up again; each is all that is needed, times their number.
  del axes
  return (dy * size,)


_add_up.defvjp(_add_up_fwd, _add_up_bwd)


def _is_axes(x: Any) -> bool:
  return isinstance(x, PartitionSpec | Partial)
