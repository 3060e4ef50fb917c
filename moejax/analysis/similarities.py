# SPDX-License-Identifier: Apache-2.0
"""How alike the experts of a layer are: their weights, and what they compute.

Cosines between experts; 0 is what unrelated ones have. Of attention experts
(mixture of attention heads) the outputs are the queries that they make.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from moejax.analysis.checkpoints import router_names
from moejax.analysis.surveys import Plan
from moejax.analysis.text import Batch
from moejax.experts import GatedMlpWeights, gated_mlp
from moejax.models import Rows, Variables, watched_routers
from moejax.models.router_state import router_places
from moejax.ops.grouped_matmul import grouped_matmul
from moejax.parallel import on_one_device
from moejax.progress import progress_bar
from moejax.runs import Run
from moejax.step import device_batch

Array = jax.Array

# Outputs of all experts exist for so many tokens at once.
_CHUNK = 32
_MATRICES = {
  "moe": ("w_gate_EDF", "w_up_EDF", "w_down_EFD"),
  "attention": ("w_q_EDKH", "w_o_EKHD"),
}


@dataclasses.dataclass(frozen=True)
class Similarity:
  """Cosines between the experts of each layer.

  Attributes:
    routers: names.
    weights_LEE: of all an expert's matrices, as one vector.
    outputs_LEE: of what they make of the same tokens, the mean over tokens.
    num_tokens: of that sample; fewer than were wanted if the text is short.
  """

  routers: tuple[str, ...]
  weights_LEE: np.ndarray
  outputs_LEE: np.ndarray
  num_tokens: int


def similarity(run: Run, plan: Plan) -> Similarity:
  """Of one checkpoint's experts; all of them compute all tokens of the sample.

  Args:
    run: as `analysis.load` returns it.
    plan: text and size of the sample, of which each domain has as much.

  Raises:
    DataError: the text is missing, unreadable or empty.
  """
  routers = router_names(run.config.model)
  places, params = router_places(run.config.model), run.variables["params"]
  x_LTD = sample_inputs(run, plan)
  backend = run.model.backends.matmul
  weights, outputs = [], []
  with progress_bar("similarity, routers", len(routers), sys.stderr) as bar:
    for place, x_TD in zip(places, x_LTD, strict=True):
      # One router's at a time: a mesh may hold more than a device does.
      matrices = on_one_device(
        tuple(place.of(params, x) for x in _MATRICES[place.kind])
      )
      weights.append(np.asarray(_weight_cosines(matrices)))
      outputs.append(_output_cosines(place.kind, matrices, x_TD, backend))
      bar.advance()
  tokens = x_LTD.shape[1]
  return Similarity(routers, np.stack(weights), np.stack(outputs), tokens)


def sample_inputs(run: Run, plan: Plan) -> np.ndarray:
  """[L, T, D] what routers and experts are given of a sample of tokens.

  As many of each domain, drawn from as many of its first batches as hold so
  many; fewer where the text or `plan.tokens` ends before.
  """
  rng, found = np.random.default_rng(0), []
  each = -(-plan.sample // len(plan.domains))
  for name in plan.domains:
    batches = _first_batches(run, plan, name, each)
    real = [batch["segment_ids"].reshape(-1) > 0 for batch in batches]
    picked = rng.permutation(np.flatnonzero(np.concatenate(real)))[:each]
    chosen = np.zeros(sum(map(len, real)), bool)
    chosen[picked] = True
    for batch, mine in zip(batches, np.split(chosen, len(batches))):
      put = device_batch(batch, run.model.placement)
      x_LTD = _inputs(run.model, run.variables, put)
      found.append(np.asarray(x_LTD[:, np.flatnonzero(mine)]))
  return np.concatenate(found, axis=1)


def _first_batches(run: Run, plan: Plan, name: str, tokens: int) -> list[Batch]:
  """Those of a domain that hold so many tokens, or all."""
  batches, count = [], 0
  for batch in plan.batches_of(name, run.tokenizer, run.config.data):
    batches.append(batch)
    count += int((batch["segment_ids"] > 0).sum())
    if count >= tokens:
      break
  return batches


@functools.partial(jax.jit, static_argnums=0)
def _inputs(model, variables: Variables, batch) -> Array:
  rows = Rows(batch["segment_ids"], batch["positions"])
  _, state = model.apply(variables, batch["tokens"], rows, mutable=["routing"])
  x_LBTD = watched_routers(model.config, state["routing"]).x_BTD
  return x_LBTD.reshape(len(x_LBTD), -1, x_LBTD.shape[-1])


@jax.jit
def _weight_cosines(matrices: tuple[Array, ...]) -> Array:
  """[E, E] of the experts' matrices, each [E, ...]."""
  highest = jax.lax.Precision.HIGHEST
  flat = [w.reshape(len(w), -1).astype(jnp.float32) for w in matrices]
  products_EE = sum(jnp.matmul(w, w.T, precision=highest) for w in flat)
  return _normed(products_EE)


def _output_cosines(kind, matrices, x_TD, backend) -> np.ndarray:
  """[E, E] mean over tokens, some tokens at a time."""
  sums_EE, T = 0.0, len(x_TD)
  padded = np.pad(x_TD, ((0, -T % _CHUNK), (0, 0)))
  for start in range(0, T, _CHUNK):
    mask_T = np.arange(start, start + _CHUNK) < T
    chunk = padded[start : start + _CHUNK]
    sums_EE += np.asarray(
      _chunk_cosines(kind, backend, matrices, chunk, mask_T)
    )
  return sums_EE / T


@functools.partial(jax.jit, static_argnums=(0, 1))
def _chunk_cosines(kind, backend, matrices, x_TD, mask_T) -> Array:
  """[E, E] sums over tokens, of every expert on every token."""
  E, T = len(matrices[0]), len(x_TD)
  multiply = functools.partial(grouped_matmul, backend=backend)
  h_AD, sizes_E = jnp.tile(x_TD, (E, 1)), jnp.full(E, T, jnp.int32)
  if kind == "moe":
    y_AD = gated_mlp(multiply, h_AD, sizes_E, GatedMlpWeights(*matrices))
  else:
    w_q_EDF = matrices[0].reshape(E, x_TD.shape[-1], -1)
    y_AD = multiply(h_AD, w_q_EDF.astype(h_AD.dtype), sizes_E)
  y_TED = y_AD.reshape(E, T, -1).swapaxes(0, 1).astype(jnp.float32)
  products_TEE = jnp.einsum(
    "ted,tfd->tef", y_TED, y_TED, precision=jax.lax.Precision.HIGHEST
  )
  cosines_TEE = jax.vmap(_normed)(products_TEE)
  return jnp.where(mask_T[:, None, None], cosines_TEE, 0.0).sum(0)


def _normed(products_EE: Array) -> Array:
  """Cosines of scalar products; 0 where a vector is."""
  norm_E = jnp.sqrt(jnp.diagonal(products_EE))
  scale_EE = norm_E[:, None] * norm_E[None]
  return jnp.where(scale_EE > 0, products_EE / scale_EE, 0.0)


def pairs(values_LEE: np.ndarray) -> np.ndarray:
  """[L, pairs] the values of two different experts, i before j."""
  E = values_LEE.shape[-1]
  return values_LEE[:, *np.triu_indices(E, 1)]
