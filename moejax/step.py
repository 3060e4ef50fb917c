# SPDX-License-Identifier: Apache-2.0
"""One training step, pure: (state, batch) -> (state, metrics)."""

import itertools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import losses, parallel
from moejax.config import Config, phases_of
from moejax.data import Shards
from moejax.models import Rows, Transformer, Variables, init_variables
from moejax.models.placement import TABLE, TOKENS, Axes, OneDevice, Partial
from moejax.models.router_state import as_router_state
from moejax.models.transformer import boxed_variables
from moejax.optimizer import make_optimizer, param_paths, run_schedule
from moejax.phases import AtStep, at_step
from moejax.routing import RouterStats, balance, resolve
from moejax.stability import TAKEN, Guard

Array = jax.Array
Batch = dict[str, Array]


BATCH_KEYS = (
  "tokens", "targets", "segment_ids", "positions", "loss_mask", "source_ids"
)  # fmt: skip


@flax.struct.dataclass
class TrainState:
  """All that a step changes; the data position is `step` itself.

  Attributes:
    step: int32, optimizer steps done.
    params: float32 parameters.
    opt_state: optimizer state.
    router_state: state of routers that have one, such as balancing biases.
    rng: key from which each step's routing noise follows.
    guard: which steps were not taken, and what spikes are told by.
    ema: moving average of the parameters; empty where the config has none.
  """

  step: Array
  params: Any
  opt_state: Any
  router_state: Any
  rng: Array
  guard: Guard
  ema: Any = flax.struct.field(default_factory=dict)

  @property
  def variables(self) -> Variables:
    """What the model is applied with."""
    state = {"router_state": self.router_state} if self.router_state else {}
    return {"params": self.params, **state}

  @property
  def averaged(self) -> Variables:
    """The same with the moving average of the parameters."""
    return self.variables | {"params": self.ema}


def device_batch(batch: dict[str, np.ndarray], placement: OneDevice) -> Batch:
  """What a step computes with, on the devices."""
  return {key: placement.put(batch[key], TOKENS) for key in BATCH_KEYS}


def init_state(
  config: Config, model: Transformer, key: Array | None = None
) -> TrainState:
  """A fresh state.

  Args:
    config, model: what is trained.
    key: that of the config's seed, which is also what None takes.
  """
  key = jax.random.key(config.seed) if key is None else key
  params_key, rng = jax.random.split(key)
  variables = init_variables(model, params_key)
  params = variables["params"]
  optimizer = make_optimizer(config)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    router_state=(
      variables["router_state"] if "router_state" in variables else {}
    ),
    rng=rng,
    guard=Guard.fresh(config.stability),
    # Arrays of its own: both are donated to a step.
    ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else {},
  )


def state_shardings(config: Config, model: Transformer, mesh: Mesh) -> Any:
  """Where each leaf of a TrainState lies on a mesh, as a TrainState.

  Raises:
    ConfigError: a parameter that does not divide, by name.
  """
  variables = parallel.shardings(mesh, boxed_variables(model))
  everywhere = NamedSharding(mesh, PartitionSpec())
  state = jax.eval_shape(lambda: init_state(config, model))
  # Moments are split over copies of the parameters too (Rajbhandari et al.
  # 2020, "ZeRO", stage 1): no layer needs them whole.
  moments = parallel.shardings(mesh, boxed_variables(model), ("data",))
  opt_state = _like_params(state.opt_state, moments["params"], everywhere)
  router_state = jax.tree.map(lambda _: everywhere, state.router_state)
  return TrainState(
    everywhere, variables["params"], opt_state, router_state, everywhere,
    jax.tree.map(lambda _: everywhere, state.guard),
    variables["params"] if config.optimizer.ema else {},
  )  # fmt: skip


def _like_params(opt_state: Any, shardings: Any, other: NamedSharding) -> Any:
  """For each moment the sharding of its parameter, `other` for all else.

  A moment's path ends with that of its parameter; what comes before it, and
  which parameters are there, is the optimizer's affair.
  """
  by_path = dict(
    zip(jax.tree.leaves(param_paths(shardings)), jax.tree.leaves(shardings))
  )

  def sharding_of(path, leaf):
    del leaf
    own = itertools.takewhile(
      lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path)
    )
    name = "/".join(reversed([str(key.key) for key in own]))
    return by_path[name] if name in by_path else other

  return jax.tree_util.tree_map_with_path(sharding_of, opt_state)


def abstract_state(
  config: Config, model: Transformer, shardings: TrainState
) -> TrainState:
  """Shapes, dtypes and shardings of a state."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    jax.eval_shape(lambda: init_state(config, model)), shardings,
  )  # fmt: skip


def shards_of(model: Transformer, batch_size: int) -> Shards:
  """Which rows of a global batch this process reads."""
  return Shards(*model.placement.reader(batch_size))


def make_train_step(
  config: Config, model: Transformer
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """The step for this config; jit it with the state donated.

  Its metrics are the loss terms, `grad_norm`, `param_norm` (of the result),
  `learning_rate`, `tokens` (targets of the batch), the router's, `load_LE`,
  each expert's share, `skipped`, why the step was not taken (0: it was),
  `skipped_in_a_row`, `batch_digest` and, of several sources, `xent_U` and
  `tokens_U`, sums over the targets of each.
  """
  schedule = run_schedule(config)
  optimizer = make_optimizer(config)

  def train_step(state, batch):
    at = at_step(config, state.step)

    def loss_fn(params):
      variables = state.replace(params=params).variables
      sums, stats = batch_sums(
        config, model, variables, batch, step_rng(state), at
      )
      loss, terms = losses.total_loss(config.loss, sums, stats, at.loss)
      return loss, (terms, sums, stats)

    grads, (metrics, sums, stats) = jax.grad(loss_fn, has_aux=True)(
      state.params
    )
    norm, rate = optax.tree.norm(grads), schedule(state.step)
    guard, loss = _guard_of(config, state), _judged(metrics)
    verdict = guard.verdict(config.stability, loss, norm)

    def take(state):
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params
      )
      params = optax.apply_updates(
        state.params, optax.tree.scale(-rate, updates)
      )
      return state.replace(
        params=params, opt_state=opt_state,
        router_state=_balanced(config, state.router_state, stats),
        ema=_average(config, state.ema, params),
      )  # fmt: skip

    # A branch, not a product with zero, which would let NaN through.
    state = jax.lax.cond(verdict == TAKEN, take, lambda state: state, state)
    state = state.replace(
      step=state.step + 1, guard=guard.after(verdict, loss, norm)
    )
    metrics |= _of_sources(sums) | {
      "grad_norm": norm, "learning_rate": rate, "tokens": sums.tokens,
      "param_norm": optax.tree.norm(state.params), "skipped": verdict,
      "skipped_in_a_row": state.guard.in_a_row,
      "batch_digest": _digest(batch),
    }  # fmt: skip
    return state, metrics | _of_routers(state, stats)

  return train_step


def _judged(metrics: dict[str, Array]) -> Array:
  """The loss by which a step is taken: no spike where loss weights change."""
  finite = jnp.isfinite(metrics["loss/total"])
  return jnp.where(finite, metrics["loss/xent"], jnp.nan)


def _guard_of(config: Config, state: TrainState) -> Guard:
  """The state's, with a new window where a phase begins."""
  starts = [phase.start for phase in phases_of(config)[1:]]
  if not starts:
    return state.guard
  return state.guard.anew(jnp.isin(state.step, np.array(starts)))


def _balanced(config: Config, router_state: Any, stats: Any) -> Any:
  """Balancing biases after a step, by the counts of the whole batch."""
  if not router_state:
    return router_state
  rate = balance.bias_rate(resolve(config.model.moe.router_spec))
  # Of the whole batch, so the same however it was split; and of what the router
  # chose: an expert whose rows found no room is no idle one.
  counts = as_router_state(config.model, stats.chosen_BE.sum(1))
  return balance.update_state(router_state, counts, rate)


def _of_routers(
  state: TrainState, stats: RouterStats | None
) -> dict[str, Array]:
  """The routers' metrics."""
  if stats is None:
    return {}
  found = losses.router_metrics(stats)
  found["load_LE"] = losses.load_shares(stats)
  if biases := jax.tree.leaves(state.router_state):
    found["router/bias_max"] = jnp.stack(
      [jnp.abs(b).max() for b in biases]
    ).max()
  return found


def _of_sources(sums: losses.LossSums) -> dict[str, Array]:
  """Sums of each source, of several."""
  if sums.xent_U is None:
    return {}
  return {"xent_U": sums.xent_U, "tokens_U": sums.tokens_U}


def _digest(batch: Batch) -> Array:
  """uint32 of a global batch, the same however it is split over devices."""
  shape = batch["tokens"].shape
  # Times odd numbers, modulo 2^32: any token in another place is another sum.
  odd_BT = 2 * jax.lax.iota(jnp.uint32, shape[0] * shape[1]).reshape(shape) + 1
  parts = (batch[key].astype(jnp.uint32) for key in ("tokens", "segment_ids"))
  sums = [(part_BT * odd_BT).sum(dtype=jnp.uint32) for part_BT in parts]
  return sums[0] + np.uint32(0x9E3779B1) * sums[1]


def _average(config: Config, ema: Any, params: Any) -> Any:
  """The average after a step; none stays none."""
  if not (decay := config.optimizer.ema):
    return ema
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), ema, params)


def batch_sums(
  config: Config,
  model: Transformer,
  variables: Variables,
  batch: Batch,
  rng: Array | None,
  at: AtStep | None = None,
) -> tuple[losses.LossSums, RouterStats | None]:
  """Loss and router sums of a global batch, in microbatches if asked.

  With accumulation, the loss is still one function of the sums over the whole
  batch, so it and its gradient are those of the big batch, balancing losses
  included. Each microbatch is computed again in the backward pass (one more
  forward), because the gradient of a global balancing loss needs the loads of
  all microbatches first.

  Args:
    batch: tokens, targets, segment_ids, positions int32 and loss_mask bool,
      each [B, T]; of several sources source_ids int32 as well.
    rng: key of this step's routing noise; None for none.
    at: what holds at this step; None takes the config's own.
  """
  B = batch["tokens"].shape[0]
  rng_B = None
  if rng is not None:
    rng_B = jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(B))
  forward = lambda micro, keys: _forward_sums(
    config, model, variables, micro, keys, at
  )
  M = config.train.accumulation_steps
  if M == 1:
    return forward(batch, rng_B)
  # Rows m, M + m, 2 M + m, ...: each device has its part of each microbatch.
  fold = lambda x: x.reshape(B // M, M, *x.shape[1:]).swapaxes(0, 1)
  micros = jax.tree.map(fold, (batch, rng_B))
  body = jax.checkpoint(lambda micro: forward(*micro), prevent_cse=False)
  _, (sums, stats) = jax.lax.scan(lambda _, m: (None, body(m)), None, micros)
  sums = jax.tree.map(lambda x: x.sum(0), sums)
  # [M, L, b, ...] -> [L, b * M, ...]: the rows of the batch, in order.
  join = lambda x: jnp.moveaxis(x, 0, 2).reshape(x.shape[1], B, *x.shape[3:])
  return sums, jax.tree.map(join, stats)


def _forward_sums(config, model, variables, batch, rng_B, at=None):
  """Sums of one microbatch."""
  at = at or AtStep(losses.LossWeights.of(config.loss))
  rows = Rows(batch["segment_ids"], batch["positions"], rng_B, rope_H=at.rope_H)
  output = model.apply(variables, batch["tokens"], rows)
  table_VD = model.apply(variables, method="output_table")

  # Of one source, all sums are its sums.
  U = len(config.data.sources) if len(config.data.sources) > 1 else 0

  def local(table_VD, z_weight, hidden_BTD, *labels):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    hidden_TD, targets_T, mask_T, *source_T = map(flat, (hidden_BTD, *labels))
    return losses.next_token_sums(
      hidden_TD, table_VD, targets_T, mask_T, z_weight, config.loss.chunk_size,
      *source_T, num_sources=U,
    )  # fmt: skip

  # Every device takes tokens of its own, also those that share heads.
  tokens = Axes("batch", "spread_tokens")
  hidden = Axes("batch", "spread_tokens", None)
  labels = [batch["targets"], batch["loss_mask"]]
  labels += [batch["source_ids"]] if U else []
  sums = model.placement.local(
    local, (TABLE, Axes(), hidden, *[tokens] * len(labels)),
    Partial(Axes(), tuple(tokens)),
  )(table_VD, at.loss.z_loss, output.hidden_BTD, *labels)  # fmt: skip
  return sums, output.stats


def make_eval_step(
  config: Config, model: Transformer
) -> Callable[[Any, Batch], tuple[losses.LossSums, RouterStats | None]]:
  """`(variables, batch) -> sums`: no routing noise, no gradient.

  The routers' sums are those of all rows, [L, 1, ...].
  """

  def eval_step(variables, batch):
    sums, stats = _forward_sums(config, model, variables, batch, None)
    return sums, jax.tree.map(lambda x: x.sum(1, keepdims=True), stats)

  return eval_step


def step_rng(state: TrainState) -> Array:
  """The key of the step that comes next."""
  return jax.random.fold_in(state.rng, state.step)
