# SPDX-License-Identifier: Apache-2.0
"""What a router gives each slice of an upcycled MLP, and so what is kept.

Experts are slices of one MLP, expert e slice e mod G: their weighted sum is the
MLP's own output, times a constant, if and only if every slice gets the same
combine weight w of every token. Down projections divided by w then make it the
dense model. Renormalised top-k with G experts (or a multiple) of groups that
score alike has w = 1/G; a softmax over all experts has no such w.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ModelConfig
from moejax.routing import resolve
from moejax.routing.inputs import asks_for, made_up_inputs, option

Array = np.ndarray
TOKENS = 2048  # rounded up to whole groups, where a router has groups
TOLERANCE = 1e-5  # float32 rounds a renormalised weight by 1e-7


@dataclasses.dataclass(frozen=True)
class SliceWeights:
  """Combine weights of a router on random tokens, in evaluation and training.

  `G` here is slices of an MLP.

  Attributes:
    weight_TG: what each slice gets of a token, in evaluation.
    train_TG: the same in training, with a key a token; not tried where the
      first is uneven.
    missing_T: assignments of each token that find no place in training.
    k: experts per token.
  """

  weight_TG: Array
  train_TG: Array
  missing_T: Array
  k: int

  @classmethod
  def of(cls, model: ModelConfig, granularity: int) -> Self:
    """Tries the model's router on logits as a fresh one gives them.

    Raises:
      ConfigError: options that the router refuses.
    """
    E, G = model.moe.num_experts, granularity
    router = resolve(model.moe.router_spec)
    T = TOKENS
    if asks_for(router, "group_size"):
      size = option(router, "group_size")
      T = -(-T // size) * size
    rng = np.random.default_rng(0)
    # Inputs are normed: a logit's variance is init_std^2 a channel.
    std = model.init_std * model.d_model**0.5
    logits = rng.normal(0, std, (T, E // G)).astype(np.float32)
    logits_TE = jnp.asarray(np.repeat(logits, G, axis=1))
    route = functools.partial(
      router, logits_TE, jnp.ones(T, bool), **made_up_inputs(router, E, T)
    )
    keys = jax.random.split(jax.random.key(0), T)

    def weights(routing) -> tuple[Array, Array]:
      weight_TG = np.zeros((T, G))
      there = np.asarray(routing.expert_A) < E
      token_A = np.asarray(routing.token_A)
      where = token_A, np.asarray(routing.expert_A) % G
      np.add.at(weight_TG, where, np.where(there, routing.weight_A, 0.0))
      lost = ~there
      if routing.unused_A is not None:
        lost &= ~np.asarray(routing.unused_A)
      return weight_TG, np.bincount(token_A[lost], minlength=T)

    weight_TG, missing_T = weights(route(rng=None))
    train_TG = weight_TG
    if _constant(weight_TG):
      train_TG, missing_T = weights(route(rng=keys))
    return cls(weight_TG, train_TG, missing_T, model.moe.experts_per_token)

  @property
  def num_slices(self) -> int:
    return self.weight_TG.shape[1]

  @property
  def is_exact(self) -> bool:
    """Whether the dense model is kept, in evaluation."""
    return _constant(self.weight_TG)

  @property
  def factor(self) -> float:
    """What down projections are multiplied by."""
    G = self.num_slices
    total = G * self.weight_TG.mean()
    # As far as rounding tells, 1 is 1: then copies are copies.
    if not self.is_exact or abs(total - 1) < TOLERANCE:
      return float(G)
    return float(G / total)

  def report(self, noise: str) -> list[str]:
    """For people: whether logits are those of the dense model, and why.

    Args:
      noise: what changes experts otherwise, if anything does.
    """
    G, factor = self.num_slices, self.factor
    scaled = [] if factor == 1 else [f"down projections are times {factor:g}"]
    if not self.is_exact or noise:
      why = [] if self.is_exact else [self._why()]
      why += [noise] if noise else []
      text = "; ".join(why + scaled)
      return [f"note: logits are not the dense model's: {text}"]
    what = "a token's weights sum to"
    if G > 1:
      what = f"of a token's weights each of {G} slices gets"
    text = "; ".join([f"{what} {self.weight_TG.mean():.4g}", *scaled])
    lines = [f"logits are the dense model's: {text}"]
    if not _constant(self.train_TG):
      why = "; ".join(self._why_not_in_training())
      lines.append(f"note: not so in training: {why}")
    return lines

  def _why_not_in_training(self) -> list[str]:
    """What a capacity does at every step, noise to ties, and all else."""
    total_T, whole_T = self.train_TG.sum(1), self.missing_T == 0
    largest_T, smallest_T = self.train_TG.max(1), self.train_TG.min(1)
    # Where an assignment has no place, its slice is missing without any noise.
    torn_T = whole_T & (largest_T - smallest_T > TOLERANCE * total_T.max())
    reasons = []
    if not whole_T.all():
      share = f"{1 - whole_T.mean():.0%}"
      reasons.append(
        f"{'<1%' if share == '0%' else share} of random tokens find an expert "
        "full, at every step, and their weights sum to less"
      )
    if torn_T.any():
      reasons.append(
        "the router's noise breaks the ties that keep slices together; without "
        "it they stay for the first step"
      )
    rest_T = total_T[whole_T & ~torn_T]
    if rest_T.size and not _constant(rest_T):
      reasons.append(
        f"a token's weights sum to {rest_T.min():.2g} to {rest_T.max():.2g}"
      )
    return reasons

  def _why(self) -> str:
    G, k = self.num_slices, self.k
    total_T1 = self.weight_TG.sum(1, keepdims=True)
    if _constant(total_T1) and k % G == 0:
      return f"the router does not send each token to all {G} slices alike"
    if _constant(total_T1):
      return (
        f"k={k} experts of a token do not hold each of {G} slices alike; use "
        f"k={-(-k // G) * G}"
      )
    return (
      f"the router's weights of a token sum to {total_T1.min():.2g} to "
      f"{total_T1.max():.2g} (mean {total_T1.mean():.2g}), not to a constant, "
      "as renormalised ones would"
    )


def _constant(weights: Array) -> bool:
  mean = weights.mean()
  return bool(mean > 0 and np.ptp(weights) <= TOLERANCE * mean)
