# SPDX-License-Identifier: Apache-2.0
"""What vocabulary specialisation is by chance, of a router blind to tokens.

`I` counts token ids, `N` tokens drawn.
"""

from collections.abc import Sequence

import numpy as np

# Tokens drawn for each router, and draws of ids among them; the error falls
# with the square roots of both.
_TOKENS = 2**14
_DRAWS = 2**12
# Ids that a chance level is computed for, of even ranks by their occurrences.
_IDS = 500


def largest_shares(
  seen: Sequence[np.ndarray], prob_LE: np.ndarray
) -> np.ndarray:
  """Mean over ids of the share of the expert with most of the id's tokens.

  Args:
    seen: occurrences of each id, [I] for each of Q kinds of ids.
    prob_LE: the share of tokens that have the expert. Each token has as many
      experts as they sum to; if that is no whole number, the one below or the
      one above.

  Returns:
    [Q, L], drawn with a standard error of half a per cent at most.
  """
  rng = np.random.default_rng(0)
  means = np.empty((len(seen), len(prob_LE)))
  seen = [_even_ranks(seen_I) for seen_I in seen]
  for layer, prob_E in enumerate(np.minimum(prob_LE, 1.0)):
    chosen_NE = draw_experts(rng, prob_E, _TOKENS)
    upto_NE = np.cumsum(chosen_NE, axis=0, dtype=np.int32)
    upto_NE = np.concatenate([np.zeros_like(upto_NE[:1]), upto_NE])
    means[:, layer] = [_mean_largest(rng, x, prob_E, upto_NE) for x in seen]
  return means


def draw_experts(
  rng: np.random.Generator, prob_E: np.ndarray, number: int
) -> np.ndarray:
  """Experts of tokens, drawn without replacement, bool [N, E].

  Systematic sampling in random order (Madow 1949): experts lie in a row, each
  as long as it is probable, and those at u, u + 1, u + 2... are taken.

  Args:
    rng: source of random numbers.
    prob_E: the probability that a token has the expert, at most 1.
    number: N.
  """
  order_NE = rng.random((number, len(prob_E)), np.float32).argsort(1)
  end_NE = prob_E[order_NE].cumsum(1) + rng.random((number, 1))
  taken_NE = np.diff(end_NE.astype(np.int32), axis=1, prepend=0) > 0
  chosen_NE = np.empty_like(taken_NE)
  np.put_along_axis(chosen_NE, order_NE, taken_NE, axis=1)
  return chosen_NE


def _even_ranks(seen_I: np.ndarray) -> np.ndarray:
  count = min(_IDS, len(seen_I))
  rank = (np.arange(count) + 0.5) * len(seen_I) / count
  return np.sort(seen_I)[rank.astype(int)]


def _mean_largest(
  rng: np.random.Generator, seen_I: np.ndarray, prob_E: np.ndarray,
  upto_NE: np.ndarray,
) -> float:  # fmt: skip
  """Of ids that have as many of the tokens, one after the other from anywhere.

  After the last token comes the first. More occurrences than there are tokens
  are as all of them, but closer to what is expected.
  """
  N = len(upto_NE) - 1
  seen_I = np.tile(seen_I, -(-_DRAWS // len(seen_I)))
  length_I = np.minimum(seen_I, N)
  start_I = rng.integers(N, size=len(seen_I))
  turn_I, rest_I = np.divmod(start_I + length_I, N)
  count_IE = turn_I[:, None] * upto_NE[N] + upto_NE[rest_I] - upto_NE[start_I]
  beyond_IE = count_IE / length_I[:, None] - prob_E
  beyond_IE *= np.sqrt(length_I / seen_I)[:, None]
  return float((prob_E + beyond_IE).max(1).mean())
