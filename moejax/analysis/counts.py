# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens of what routers chose, added up batch by batch.

All measures of routing follow from them, so memory does not grow with the
text. Each of the three `Q` kinds of token ids has its own row of `Words`.
"""

import dataclasses
import functools
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moejax.models import Rows, Transformer, Variables, watched_routers
from moejax.routing import Choices

Array = jax.Array

KINDS = ("input", "predicted", "next")
# Counts are 32-bit integers on the device.
MAX_TOKENS = 2**31 - 1
# Tokens whose logits exist at once.
_CHUNK = 1024


@flax.struct.dataclass
class Tally:
  """Of some text; `a + b` is that of both.

  Attributes:
    tokens: real tokens.
    chosen_LE: tokens that have the expert among theirs.
    top_LE: tokens whose best expert it is.
    together_LEE: tokens that have both; the diagonal is `chosen_LE`.
    entropy_L: sum of the routers' entropies, as shares of the largest.
  """

  tokens: Array
  chosen_LE: Array
  top_LE: Array
  together_LEE: Array
  entropy_L: Array

  def __add__(self, other: Self) -> Self:
    return jax.tree.map(lambda a, b: a + b, self, other)

  @classmethod
  def of(cls, choices: Choices, mask_BT: Array) -> Self:
    """Of one batch; counts are exact up to 2**24 tokens."""
    L, *_, E = choices.chosen_BTE.shape
    chosen_LTE = choices.chosen_BTE.reshape(L, -1, E).astype(jnp.float32)
    together_LEE = jnp.einsum(
      "lte,ltf->lef", chosen_LTE, chosen_LTE,
      precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    return cls(
      tokens=mask_BT.sum(dtype=jnp.int32),
      chosen_LE=chosen_LTE.sum(1).astype(jnp.int32),
      top_LE=_one_hot(choices.top_BT, E).sum((1, 2), dtype=jnp.int32),
      together_LEE=together_LEE.astype(jnp.int32),
      entropy_L=choices.entropy_BT.sum((1, 2)),
    )


@flax.struct.dataclass
class Words:
  """By token id, for ids as input, as predicted and as true next token.

  Attributes:
    seen_QV: tokens of this id.
    chosen_QVLE: those of them that have the expert among theirs.
    top_QVLE: those of them whose best expert it is.
  """

  seen_QV: Array
  chosen_QVLE: Array
  top_QVLE: Array

  @classmethod
  def empty(cls, vocab_size: int, num_routers: int, num_experts: int) -> Self:
    ids = (len(KINDS), vocab_size)
    zeros = lambda: jnp.zeros((*ids, num_routers, num_experts), jnp.int32)
    return cls(jnp.zeros(ids, jnp.int32), zeros(), zeros())

  @staticmethod
  def bytes_of(vocab_size: int, num_routers: int, num_experts: int) -> int:
    """Memory that they take."""
    return 4 * len(KINDS) * vocab_size * (1 + 2 * num_routers * num_experts)

  def add(self, choices: Choices, ids_QT: Array, known_QT: Array) -> Self:
    """With the tokens of a batch, flattened; unknown ids count nowhere."""
    L, *_, E = choices.chosen_BTE.shape
    by_token = lambda x: jnp.moveaxis(x.reshape(L, -1, E), 0, 1)
    chosen_TLE = by_token(choices.chosen_BTE).astype(jnp.int32)
    top_TLE = by_token(_one_hot(choices.top_BT, E)).astype(jnp.int32)
    # Beyond the vocabulary is nowhere.
    ids_QT = jnp.where(known_QT, ids_QT, self.seen_QV.shape[1])
    kinds = jnp.arange(len(KINDS))[:, None]
    spread = lambda x: jnp.broadcast_to(x[None], (len(KINDS), *x.shape))
    at = lambda sums: sums.at[kinds, ids_QT]
    return Words(
      at(self.seen_QV).add(1, mode="drop"),
      at(self.chosen_QVLE).add(spread(chosen_TLE), mode="drop"),
      at(self.top_QVLE).add(spread(top_TLE), mode="drop"),
    )


def _one_hot(top: Array, E: int) -> Array:
  """bool [..., E] of indices, of which E is nowhere."""
  return top[..., None] == jnp.arange(E).reshape(*[1] * top.ndim, E)


def choices(
  model: Transformer,
  variables: Variables,
  tokens_BT: Array,
  rows: Rows | None = None,
) -> Choices:
  """What each router chose for each token, stacked [L, B, T, ...].

  Args:
    model, variables: as `analysis.load` returns them; on a mesh too.
    tokens_BT: token ids.
    rows: their documents; None takes each row for one.
  """
  tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
  if rows is None:
    B, T = tokens_BT.shape
    places = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    rows = Rows(jnp.ones((B, T), jnp.int32), places)
  return _watch(model, variables, tokens_BT, rows)[0]


@functools.partial(jax.jit, static_argnums=0)
def _watch(model, variables, tokens_BT, rows):
  """(choices, hidden states) of a batch."""
  output, state = model.apply(variables, tokens_BT, rows, mutable=["routing"])
  watched = watched_routers(model.config, state["routing"])
  return watched.choices, output.hidden_BTD


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def add_batch(model, variables, batch, tally, words):
  """One more batch of the text.

  Args:
    model, variables: of the checkpoint.
    batch: as `step.device_batch` puts it on the devices.
    tally: so far.
    words: so far; None leaves them out.

  Returns:
    Tally and words, and the entropies of this batch alone, whose float32 sums
    are better added up on the host.
  """
  rows = Rows(batch["segment_ids"], batch["positions"])
  made, hidden_BTD = _watch(model, variables, batch["tokens"], rows)
  mask_BT = batch["segment_ids"] > 0
  one = Tally.of(made, mask_BT)
  if words is not None:
    predicted_T = predicted_tokens(model, variables, hidden_BTD)
    ids = batch["tokens"].reshape(-1), predicted_T, batch["targets"].reshape(-1)
    known = mask_BT, mask_BT, batch["loss_mask"]
    known = jnp.stack([x.reshape(-1) for x in known])
    words = words.add(made, jnp.stack(ids), known)
  zero_L = jnp.zeros_like(one.entropy_L)
  return tally + one.replace(entropy_L=zero_L), words, one.entropy_L, made


def predicted_tokens(model, variables, hidden_BTD: Array) -> Array:
  """[T] likeliest next ids of the flattened tokens."""
  hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
  T = len(hidden_TD)
  size = min(_CHUNK, T)
  padded = jnp.pad(hidden_TD, ((0, -T % size), (0, 0)))

  def likeliest(hidden_TD):
    logits_1TV = model.apply(variables, hidden_TD[None], method="logits")
    return logits_1TV[0].argmax(-1).astype(jnp.int32)

  chunks = padded.reshape(-1, size, hidden_TD.shape[-1])
  return jax.lax.map(likeliest, chunks).reshape(-1)[:T]


def zero_tally(num_routers: int, num_experts: int) -> Tally:
  """Of no text."""
  L, E = num_routers, num_experts
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
  return Tally(
    zeros(), zeros(L, E), zeros(L, E), zeros(L, E, E), jnp.zeros(L, jnp.float32)
  )


def on_host(tally: Tally, entropy_L: np.ndarray) -> Tally:
  """64-bit NumPy sums, entropies as they were added up there."""
  whole = lambda x: np.asarray(x).astype(np.int64)
  tally = jax.tree.map(whole, tally)
  return dataclasses.replace(tally, entropy_L=np.asarray(entropy_L, np.float64))


def sum_of(tallies: Any) -> Tally:
  """Of all the texts."""
  first, *rest = tallies
  return sum(rest, start=first)
