# SPDX-License-Identifier: Apache-2.0
"""The tokens that an expert is the expert of, as text.

Voc(i, x) = N_k(x, i) / N(x), with x an id as input, as predicted or as true
next token (OLMoE, arXiv:2409.02060), which are the `Q` kinds of ids.
"""

import re
from collections.abc import Iterable

import numpy as np

from moejax.analysis.counts import KINDS
from moejax.analysis.surveys import Survey
from moejax.data.tokenizer import Tokenizer

# Characters that a table could not show, and their names.
_SHOWN = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "⇤"}
_NAMES = {
  "␣": "a space", "⏎": "a line end", "⇥": "a tab", "⇤": "a carriage return"
}  # fmt: skip

Columns = dict[str, np.ndarray]


def token_table(
  survey: Survey,
  tokenizer: Tokenizer,
  min_count: int = 10,
  per_expert: int = 20,
) -> Columns:
  """The ids of which each expert is most often the best one.

  Args:
    survey: with its words.
    tokenizer: the model's.
    min_count: occurrences that an id needs.
    per_expert: ids of each router, kind and expert, most specialised first.

  Returns:
    Columns `router`, `kind`, `expert`, `id`, `text`, `count` (occurrences),
    `top_share` (with this expert as the best), `share` (with it among theirs)
    and `chance`: of `top_share`, what an even router gives (1/E), or the
    expert's share of all tokens where that is more.
  """
  words, parts = survey.words, []
  chance_LE = np.maximum(
    1 / survey.num_experts, survey.total.top_LE / survey.total.tokens
  )
  for q, kind in enumerate(KINDS):
    ids = np.flatnonzero(words.seen_QV[q] >= min_count)
    count = words.seen_QV[q][ids]
    for router, name in enumerate(survey.routers):
      shares = [
        counts_QVLE[q][ids, router] / count[:, None]
        for counts_QVLE in (words.top_QVLE, words.chosen_QVLE)
      ]
      parts += [
        (
          name,
          kind,
          expert,
          ids[i],
          count[i],
          *(s[i, expert] for s in shares),
          chance_LE[router, expert],
        )
        for expert in range(survey.num_experts)
        for i in _most_specialised(shares[0][:, expert], count, per_expert)
      ]
  names = (
    "router", "kind", "expert", "id", "count", "top_share", "share", "chance"
  )  # fmt: skip
  table = {
    name: np.array(column)
    for name, column in zip(names, zip(*parts, strict=True), strict=True)
  }
  known = {i: spell(tokenizer, int(i)) for i in np.unique(table["id"])}
  table["text"] = np.array([known[i] for i in table["id"]])
  return table


def spell(tokenizer: Tokenizer, token_id: int) -> str:
  """A token as visible text: spaces as `␣`, pieces of characters as `#id`."""
  text = tokenizer.decode([token_id])
  if not text or "\ufffd" in text:
    return f"#{token_id}"
  return "".join(_SHOWN[c] if c in _SHOWN else c for c in text)


def legend(texts: Iterable[str]) -> str:
  """What the signs among spelt tokens stand for; empty without any."""
  texts = list(texts)
  known = [
    f"{sign} is {name}"
    for sign, name in _NAMES.items()
    if any(sign in text for text in texts)
  ]
  pieces = [text for text in texts if re.fullmatch(r"#\d+", text)]
  if pieces:
    known.append(
      f"{min(pieces)} is the token of that id, which is no whole character (a "
      "part of one, or a mark such as a document's start)"
    )
  return "; ".join(known)


def _most_specialised(
  share: np.ndarray, count: np.ndarray, most: int
) -> np.ndarray:
  """Indices by share, then by count; none that the expert never gets."""
  order = np.lexsort((-count, -share))[:most]
  return order[share[order] > 0]
