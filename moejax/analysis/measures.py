# SPDX-License-Identifier: Apache-2.0
"""Measures of routing with OLMoE's definitions (arXiv:2409.02060).

Each is a pure function of what `survey` counted, and each result holds what
chance would give. Where a router has no fixed number of experts per token, k is
the mean number. `M` counts checkpoints, `U` domains, `Q` kinds of token ids.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moejax.analysis.chance import largest_shares
from moejax.analysis.counts import KINDS, Tally
from moejax.analysis.surveys import Survey
from moejax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Saturation:
  """How much of the last checkpoint's routing each one has.

  Attributes:
    routers: names.
    steps_M: of the checkpoints, the last among them.
    names_M: what to call them.
    share_ML: |E_t n E_T| / |E_T|, E_t a token's experts at step t, as a ratio
      of sums over tokens. With a fixed k this is the mean over tokens; else
      those with more experts count for more, and those with none do not.
    top_share_ML: the same for the best expert alone.
    chance_ML: of routers with these loads that know nothing of each other,
      sum_e p_t(e) p_T(e) / sum_e p_T(e), p being the share of tokens that have
      expert e. Where one of them is even that is k_t / E, with the earlier
      one's own k_t; where both prefer the same experts it is more.
    top_chance_ML: the same of best experts; 1 / E where one of them is even.
  """

  routers: tuple[str, ...]
  steps_M: np.ndarray
  names_M: tuple[str, ...]
  share_ML: np.ndarray
  top_share_ML: np.ndarray
  chance_ML: np.ndarray
  top_chance_ML: np.ndarray


@dataclasses.dataclass(frozen=True)
class CoActivation:
  """Which experts work on the same tokens.

  Attributes:
    routers: names.
    share_LEE: Co(i, j) = N(i and j) / N(i), over all pairs; NaN where i = j or
      i was never chosen.
    count_LE: N(i).
    chance_L: (k - 1) / (E - 1), of experts chosen independently; where k
      varies, pairs over N(i) and E - 1, the mean of k (k - 1) over that of k;
      NaN where the router chose no expert.
  """

  routers: tuple[str, ...]
  share_LEE: np.ndarray
  count_LE: np.ndarray
  chance_L: np.ndarray


@dataclasses.dataclass(frozen=True)
class DomainSpecialisation:
  """Dom(i, D) = N_k(i, D) / N(D), the share of D's tokens that expert i gets.

  Attributes:
    routers, domains: names.
    share_ULE: by expert among the k of a token.
    top_share_ULE: by best expert.
    tokens_U: N(D).
    chance_L: k / E; of the best expert it is 1 / E, if all tokens have one.
  """

  routers: tuple[str, ...]
  domains: tuple[str, ...]
  share_ULE: np.ndarray
  top_share_ULE: np.ndarray
  tokens_U: np.ndarray
  chance_L: np.ndarray

  @property
  def mean_LE(self) -> np.ndarray:
    """Each expert's share of a domain, mean over domains: its load."""
    return self.share_ULE.mean(0)

  @property
  def deviation_ULE(self) -> np.ndarray:
    """What an expert has of a domain beyond its mean; 0 if there is one."""
    return self.share_ULE - self.mean_LE


@dataclasses.dataclass(frozen=True)
class VocabularySpecialisation:
  """How much of the tokens of one id go to one expert.

  Of each id with enough occurrences, the share of the expert that gets most of
  them; then the mean over ids.

  Attributes:
    routers: names.
    kinds: what the id is of: the token, the predicted next, the true next one.
    ids_Q: ids that occur often enough.
    share_QL: by expert among the k of a token.
    top_share_QL: by best expert.
    chance_QL, top_chance_QL: of a router that sees no token but has the same
      loads and as many experts a token, drawn for as many occurrences; the best
      of E chance shares lies above k / E.
    min_count: occurrences that an id needs.
  """

  routers: tuple[str, ...]
  kinds: tuple[str, ...]
  ids_Q: np.ndarray
  share_QL: np.ndarray
  top_share_QL: np.ndarray
  chance_QL: np.ndarray
  top_chance_QL: np.ndarray
  min_count: int


@dataclasses.dataclass(frozen=True)
class Load:
  """Each expert's share of its router's assignments, over the fair share 1/E.

  Attributes:
    routers: names.
    steps_M: of the checkpoints.
    names_M: what to call them.
    load_MLE: 1 is fair; 0 of all experts where their router chose none of them,
      but null experts.
  """

  routers: tuple[str, ...]
  steps_M: np.ndarray
  names_M: tuple[str, ...]
  load_MLE: np.ndarray


@dataclasses.dataclass(frozen=True)
class Entropy:
  """Mean entropy of the router's probabilities as a share of the largest, ln E.

  Attributes:
    routers: names.
    steps_M: of the checkpoints.
    names_M: what to call them.
    share_ML: 1 is no preference, 0 is always sure of one expert. A router's
      null experts are among the E.
  """

  routers: tuple[str, ...]
  steps_M: np.ndarray
  names_M: tuple[str, ...]
  share_ML: np.ndarray


def saturation(surveys: Sequence[Survey]) -> Saturation:
  """Of checkpoints that `survey_all` compared with the last one.

  Raises:
    ConfigError: there is one checkpoint only.
  """
  *earlier, last = surveys
  if not earlier:
    raise ConfigError(
      "saturation compares checkpoints, and there is one; name several, or "
      "RUN:all"
    )
  L = len(last.routers)
  whole = np.ones((1, L))
  ratio = lambda a, b: np.stack([_ratio(a(s), b(s)) for s in earlier])
  chance = lambda count_LE: np.stack([
    _by_chance(count_LE(s.total) / s.total.tokens,
               count_LE(last.total) / last.total.tokens) for s in surveys
  ])  # fmt: skip
  return Saturation(
    routers=last.routers,
    steps_M=np.array([s.step for s in surveys]),
    names_M=tuple(s.label for s in surveys),
    share_ML=np.concatenate(
      [ratio(lambda s: s.overlap.same_L, lambda s: s.overlap.wanted_L), whole]
    ),
    top_share_ML=np.concatenate([
      ratio(lambda s: s.overlap.top_L, lambda s: s.overlap.top_wanted_L), whole
    ]),
    chance_ML=chance(lambda total: total.chosen_LE),
    top_chance_ML=chance(lambda total: total.top_LE),
  )  # fmt: skip


def co_activation(survey: Survey) -> CoActivation:
  """Of all domains together, over all pairs of a token's experts."""
  total, E = survey.total, survey.num_experts
  share_LEE = _ratio(total.together_LEE, total.chosen_LE[:, :, None])
  share_LEE[:, np.arange(E), np.arange(E)] = np.nan
  pairs_L = total.together_LEE.sum((1, 2)) - total.chosen_LE.sum(1)
  return CoActivation(
    routers=survey.routers,
    share_LEE=share_LEE,
    count_LE=total.chosen_LE,
    chance_L=_ratio(pairs_L, total.chosen_LE.sum(1) * max(1, E - 1)),
  )


def domain_specialisation(survey: Survey) -> DomainSpecialisation:
  """Of each domain apart."""
  tallies = survey.domains.values()
  tokens_U = np.array([t.tokens for t in tallies])
  shares = lambda counts: np.stack(counts) / tokens_U[:, None, None]
  return DomainSpecialisation(
    routers=survey.routers,
    domains=tuple(survey.domains),
    share_ULE=shares([t.chosen_LE for t in tallies]),
    top_share_ULE=shares([t.top_LE for t in tallies]),
    tokens_U=tokens_U,
    chance_L=_experts_per_token(survey.total) / survey.num_experts,
  )


def vocabulary_specialisation(
  survey: Survey, min_count: int = 10
) -> VocabularySpecialisation:
  """Of all domains together, by ids with at least `min_count` occurrences.

  Raises:
    ConfigError: no id occurs so often.
  """
  words, total = survey.words, survey.total
  kept = [np.flatnonzero(seen_V >= min_count) for seen_V in words.seen_QV]
  if not all(map(len, kept)):
    raise ConfigError(
      f"no token id occurs {min_count} times; lower --min-count or give more "
      "text"
    )
  curve = lambda count_QVLE: np.stack([
    (count_QVLE[q][ids] / words.seen_QV[q][ids][:, None, None]).max(2).mean(0)
    for q, ids in enumerate(kept)
  ])  # fmt: skip
  seen = [words.seen_QV[q][ids] for q, ids in enumerate(kept)]
  return VocabularySpecialisation(
    routers=survey.routers,
    kinds=KINDS,
    ids_Q=np.array(list(map(len, kept))),
    share_QL=curve(words.chosen_QVLE),
    top_share_QL=curve(words.top_QVLE),
    chance_QL=largest_shares(seen, total.chosen_LE / total.tokens),
    top_chance_QL=largest_shares(seen, total.top_LE / total.tokens),
    min_count=min_count,
  )


def load(surveys: Sequence[Survey]) -> Load:
  """Of each checkpoint, all domains together."""
  counts = np.stack([s.total.chosen_LE for s in surveys])
  share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
  last = surveys[-1]
  steps_M = np.array([s.step for s in surveys])
  names = tuple(s.label for s in surveys)
  return Load(last.routers, steps_M, names, share * last.num_experts)


def entropy(surveys: Sequence[Survey]) -> Entropy:
  """Of each checkpoint, all domains together."""
  last = surveys[-1]
  share = [s.total.entropy_L / s.total.tokens for s in surveys]
  steps_M = np.array([s.step for s in surveys])
  names = tuple(s.label for s in surveys)
  return Entropy(last.routers, steps_M, names, np.stack(share))


@dataclasses.dataclass(frozen=True)
class Pair:
  """Experts i, j of a router that are chosen together beyond their loads.

  Attributes:
    i, j: the experts.
    share: of i's tokens, that j gets too.
    others: of the other experts' tokens, that j gets too: a busy expert is in
      all company.
  """

  i: int
  j: int
  share: float
  others: float

  @property
  def excess(self) -> float:
    return self.share - self.others


def strongest_pair(share_EE: np.ndarray, count_E: np.ndarray) -> Pair | None:
  """The pair of the highest excess; None if no expert was ever chosen.

  Experts of less than a twentieth of the mean count tell too little.
  """
  if np.isnan(share_EE).all():
    return None
  together_EE = np.nan_to_num(share_EE) * count_E[:, None]
  left_EE = count_E.sum() - count_E[:, None] - count_E
  others_EE = _ratio(together_EE.sum(0) - together_EE, left_EE)
  others_EE = np.nan_to_num(others_EE)
  excess_EE = np.where(np.isnan(share_EE), -np.inf, share_EE - others_EE)
  excess_EE[count_E < count_E.mean() / 20] = -np.inf
  i, j = np.unravel_index(excess_EE.argmax(), excess_EE.shape)
  return Pair(int(i), int(j), float(share_EE[i, j]), float(others_EE[i, j]))


def idle_routers(survey: Survey) -> list[str]:
  """Names of those that sent no token to any expert."""
  there_L = survey.total.chosen_LE.any(1)
  return [name for name, there in zip(survey.routers, there_L) if not there]


def _by_chance(mine_LE: np.ndarray, last_LE: np.ndarray) -> np.ndarray:
  """[L] of what the last one chose, what a blind router with its loads has.

  Args:
    mine_LE: the share of tokens that have each expert.
    last_LE: the same of the last checkpoint.
  """
  both_L = (mine_LE * last_LE).sum(1)
  return np.nan_to_num(_ratio(both_L, last_LE.sum(1)))


def _experts_per_token(total: Tally) -> np.ndarray:
  """[L] k, or the mean number."""
  return total.chosen_LE.sum(1) / total.tokens


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """a / b, NaN where there is nothing."""
  return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)
