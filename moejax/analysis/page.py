# SPDX-License-Identifier: Apache-2.0
"""The page of an analysis: each picture, how to read it, and token tables."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from moejax.analysis import lines, maps, measures, vocabulary
from moejax.analysis.similarities import Similarity
from moejax.analysis.vocabulary import Columns
from moejax.files import write_atomically
from moejax.progress import progress_bar
from moejax.report import pictures
from moejax.report.charts import Chart, percent
from moejax.report.page import card, document, escape, folded_table

TOKENS_SHOWN = 8
KIND_NAMES = {
  "input": "the token itself",
  "predicted": "the predicted next token",
  "next": "the true next token",
}


@dataclasses.dataclass(frozen=True)
class Analysis:
  """All that was found.

  Attributes:
    name: of the run.
    facts: short sentences on checkpoint and text.
    results: measures by name.
    tokens: table of tokens by expert; None where ids were not counted.
    left_out: why measures or parts of them are missing.
  """

  name: str
  facts: list[str]
  results: dict[str, Any]
  tokens: Columns | None
  left_out: list[str]


@functools.singledispatch
def charts(result: Any) -> list[Chart]:
  """The pictures of a measure."""
  raise TypeError(f"{type(result).__name__} is no measure")


@charts.register
def _(result: measures.Saturation):
  return [lines.saturation_chart(result)]


@charts.register
def _(result: measures.CoActivation):
  return [maps.co_activation_chart(result)]


@charts.register
def _(result: measures.DomainSpecialisation):
  return [maps.domain_chart(result)]


@charts.register
def _(result: measures.VocabularySpecialisation):
  return [lines.vocabulary_chart(result)]


@charts.register
def _(result: measures.Load):
  over_time = len(result.steps_M) > 1
  return [maps.load_chart(result)] + (
    [lines.load_over_time_chart(result)] if over_time else []
  )


@charts.register
def _(result: measures.Entropy):
  return [lines.entropy_chart(result)]


@charts.register
def _(result: Similarity):
  return [lines.similarity_chart(result), maps.similarity_map_chart(result)]


def draw(result: Any) -> Any:
  """A measure's first picture as a matplotlib figure, for notebooks."""
  return pictures.figure_of(charts(result)[0])


HEADINGS = {
  "saturation": "Saturation: when is routing settled?",
  "co_activation": "Co-activation: which experts work together?",
  "domains": "Domains: which expert gets which text?",
  "vocabulary": "Vocabulary: which expert gets which token?",
  "load": "Load: who works how much?",
  "entropy": "Entropy: how sure are the routers?",
  "similarity": "Similarity: how different are the experts?",
}


# Names of all pictures that there can be.
PICTURES = (*HEADINGS, "load_over_time", "similarity_map")


def render(found: Analysis, drawn: Callable[[], None] = lambda: None) -> str:
  """The whole page, which opens offline; `drawn` is called for each picture."""
  facts = "".join(f"<span>{escape(fact)}</span>" for fact in found.facts)
  body = [
    f'<div class="head"><h1>Routing of {escape(found.name)}</h1></div>',
    f'<p class="facts">{facts}</p>',
  ]
  for name, heading in HEADINGS.items():
    if name not in found.results:
      continue
    cards = []
    for chart in charts(found.results[name]):
      cards.append(card(chart))
      drawn()
    body.append(f'<h2>{heading}</h2><div class="cards">{"".join(cards)}</div>')
    if name == "vocabulary" and found.tokens is not None:
      E = found.results["load"].load_MLE.shape[-1]
      body.append(_token_tables(found.tokens, E))
  notes = "".join(f"<li>{escape(reason)}</li>" for reason in found.left_out)
  body.append(f"<h2>Left out</h2><ul>{notes}</ul>" if notes else "")
  footer = (
    "Written by <code>moejax analyze</code>. All numbers lie beside this page: "
    "<code>summary.json</code> and a table for each measure."
  )
  return document(f"Routing of {found.name}", body, footer)


def write(found: Analysis, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes the PNG files and index.html, whose path is the last returned."""
  every = [c for result in found.results.values() for c in charts(result)]
  with progress_bar("drawing, pictures", 2 * len(every), sys.stderr) as bar:
    paths = [folder / f"{chart.name}.png" for chart in every]
    for chart, path in zip(every, paths):
      pictures.save_png(chart, path)
      bar.advance()
    paths.append(folder / "index.html")
    write_atomically(paths[-1], render(found, bar.advance))
  return paths


def _token_tables(tokens: Columns, num_experts: int) -> str:
  """A table for some layers and each kind of id, a row an expert."""
  routers = list(dict.fromkeys(tokens["router"].tolist()))
  tables, shown = [], set()
  for i in maps.shown_routers(len(routers)):
    for kind, words in KIND_NAMES.items():
      mine = (tokens["router"] == routers[i]) & (tokens["kind"] == kind)
      rows, number = "", 0
      for expert in range(num_experts):
        places = _above_chance(tokens, mine & (tokens["expert"] == expert))
        rows += _expert_row(tokens, expert, places)
        number += len(places)
        shown.update(tokens["text"][places].tolist())
      title = f"{routers[i]}, by {words}"
      tables.append(folded_table(title, f"{number} tokens", rows))
  signs = vocabulary.legend(sorted(shown))
  lead = (
    "The tokens of which each expert is most often the best one, with the "
    "share of their occurrences: only those above chance, which is 1/E "
    f"({100 / num_experts:.3g}\u00a0%), or the expert's share of all "
    f"tokens where that is more. {escape(signs)}{'. ' if signs else ''}"
    "Tokens of all layers, and those below chance, are in the table "
    "<code>tokens</code> beside this page."
  )
  return f'<p class="lead">{lead}</p>{"".join(tables)}'


def _above_chance(tokens: Columns, mine: np.ndarray) -> np.ndarray:
  """Places of an expert's first tokens that it has more of than by chance."""
  above = mine & (tokens["top_share"] > tokens["chance"])
  return np.flatnonzero(above)[:TOKENS_SHOWN]


def _expert_row(tokens: Columns, expert: int, places: np.ndarray) -> str:
  cells = " ".join(
    f'<code class="value">{escape(tokens["text"][i])}</code> '
    f"{escape(percent(tokens['top_share'][i]))}"
    for i in places
  )
  cells = cells or "none above chance"
  return f"<tr><td>expert&nbsp;{expert}</td><td>{cells}</td></tr>"
