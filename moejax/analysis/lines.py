# SPDX-License-Identifier: Apache-2.0
"""Pictures with a curve over layers or over checkpoints.

`M` counts checkpoints, `Q` kinds of token ids.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.analysis.checkpoints import step_label
from moejax.analysis.measures import (
  Entropy,
  Load,
  Saturation,
  VocabularySpecialisation,
)
from moejax.analysis.similarities import Similarity, pairs
from moejax.progress import format_count
from moejax.report.charts import (
  FULL,
  Chart,
  head_axis,
  legend,
  note_on_line,
  number,
  percent,
  reference_line,
)
from moejax.report.style import LIGHT, short_name

# From the first layer to the last.
DEPTH_COLOURS = (LIGHT["blue"], LIGHT["purple"], LIGHT["orange"])
MAX_CHECKPOINTS = 5


def saturation_chart(result: Saturation) -> Chart:
  """Two panels: the best expert, and all of a token's."""
  panels = (
    ("best expert of a token", result.top_share_ML, result.top_chance_ML),
    ("all experts of a token", result.share_ML, result.chance_ML),
  )

  def draw(figure: Any, narrow: bool) -> None:
    axes = _panels(figure, narrow, sharey=True)
    for ax, (name, share_ML, chance_ML) in zip(axes, panels):
      x = checkpoint_axis(ax, result.steps_M, result.names_M)
      _router_lines(ax, result.routers, x, share_ML)
      _share_axis(ax, f"share of the last choice, {name}")
      _chance_line(ax, x, chance_ML.mean(1))
    _depth_key(figure, axes, result.routers)

  first_L, names = result.share_ML[0], [*map(short_name, result.names_M)]
  if np.isnan(first_L).all():
    title = f"In {names[-1]} no token goes to any expert"
  else:
    title = (
      f"{percent(np.nanmean(first_L))} of the routing of {names[-1]} is "
      f"already that of {names[0]}"
    )
  note = (
    "Router saturation: of the experts that a token has at the last "
    "checkpoint, the share that it has at an earlier one too; a line a layer. "
    "100 % is settled for good. Dashed: what two routers share that have these "
    "loads and know nothing of each other, mean over layers; with even loads "
    "k/E, and more where both prefer the same experts."
  )
  return Chart("saturation", title, note, draw, (FULL, 330), (348, 580))


def vocabulary_chart(result: VocabularySpecialisation) -> Chart:
  """Three kinds of ids over layers, by best expert and by all."""
  panels = (
    ("best expert", result.top_share_QL, result.top_chance_QL),
    ("any of a token's experts", result.share_QL, result.chance_QL),
  )
  names = ("token itself", "predicted next", "true next")
  colours = ("blue", "orange", "green")

  def draw(figure: Any, narrow: bool) -> None:
    axes = _panels(figure, narrow, sharey=True)
    for ax, (name, share_QL, chance_QL) in zip(axes, panels):
      for kind, colour, share_L in zip(names, colours, share_QL):
        _over_layers(ax, result.routers, share_L, LIGHT[colour], kind)
      _over_layers(
        ax, result.routers, chance_QL.mean(0), LIGHT["soft"], "chance",
        linestyle=(0, (4, 3)), linewidth=1.0, marker="",
      )  # fmt: skip
      _share_axis(ax, name)
      ax.set_xlabel("layer", labelpad=2)
    legend(axes[0], 2 if narrow else 4)

  last = [percent(x) for x in result.top_share_QL[:2, -1]]
  title = (
    f"In the last layer, one expert takes {last[0]} of a token's occurrences, "
    f"{last[1]} of a prediction's"
  )
  note = (
    "Vocabulary specialisation: of all occurrences of one token id, the share "
    "that goes to the expert that gets most of them, mean over ids with at "
    f"least {result.min_count}. 100 % is an expert for each id. Dashed: what a "
    "router with the same loads would show if it saw no token."
  ) + _attention_note(result.routers)
  return Chart("vocabulary", title, note, draw, (FULL, 330), (348, 580))


def entropy_chart(result: Entropy) -> Chart:
  """Over layers, a line a checkpoint."""
  shown = _some(len(result.steps_M), MAX_CHECKPOINTS)
  colours = _ramp(len(shown))

  def draw(figure: Any, narrow: bool) -> None:
    ax = figure.subplots()
    for m, colour in zip(shown, colours):
      label = short_name(result.names_M[m])
      _over_layers(ax, result.routers, result.share_ML[m], colour, label)
    _share_axis(ax, "entropy ÷ ln E")
    ax.set_ylim(0, 1.12)
    ax.set_xlabel("layer", labelpad=2)
    reference_line(ax, 1.0, "uniform: no preference")
    if len(shown) > 1:
      figure.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center",
        ncol=3 if narrow else len(shown), handlelength=1.3, columnspacing=1.2,
      )  # fmt: skip

  last_L = result.share_ML[-1]
  title = (
    f"Routers are at {percent(last_L.min())} to {percent(last_L.max())} of the "
    "largest entropy"
  )
  note = (
    "Mean entropy of the router's probabilities over ln E, by layer (null "
    "experts, where a router has them, are among the E). Near 0 "
    "the router is sure of one expert; a router that prefers none is at 100 %, "
    "the dashed line."
  ) + _attention_note(result.routers)
  return Chart("entropy", title, note, draw, (FULL, 320), (348, 300))


def load_over_time_chart(result: Load) -> Chart:
  """The busiest and the idlest expert of each layer, over checkpoints."""
  panels = (
    ("busiest expert, load ÷ fair share", result.load_MLE.max(-1)),
    ("idlest expert, load ÷ fair share", result.load_MLE.min(-1)),
  )

  def draw(figure: Any, narrow: bool) -> None:
    axes = _panels(figure, narrow, sharey=False)
    for ax, (name, load_ML) in zip(axes, panels):
      x = checkpoint_axis(ax, result.steps_M, result.names_M)
      _router_lines(ax, result.routers, x, load_ML)
      ax.set_ylim(0, 1.1 * max(1.0, np.nanmax(load_ML)))
      head_axis(ax, name)
      reference_line(ax, 1.0, "fair share", below=load_ML.max() <= 1)
    _depth_key(figure, axes, result.routers)

  # Mean over layers: the worst of all may stay where the others move.
  first, last = (result.load_MLE[m].max(1).mean() for m in (0, -1))
  title = (
    f"A layer's busiest expert went from {number(first)}× to {number(last)}× "
    "its fair share, in the mean over layers"
  )
  note = (
    "Load over the fair share 1/E at each checkpoint; a line a layer. Even "
    "routing has both at 1, the dashed line; a dead expert is at 0."
  )
  return Chart("load_over_time", title, note, draw, (FULL, 330), (348, 580))


def similarity_chart(result: Similarity) -> Chart:
  """Mean and largest cosine over layers, of weights and of outputs."""
  both = (
    ("outputs", result.outputs_LEE, "orange"),
    ("weights", result.weights_LEE, "blue"),
  )

  def draw(figure: Any, narrow: bool) -> None:
    ax = figure.subplots()
    for name, cosine_LEE, colour in both:
      values_LA = pairs(cosine_LEE)
      _over_layers(
        ax, result.routers, values_LA.mean(1), LIGHT[colour], f"{name}, mean"
      )
      _over_layers(
        ax, result.routers, values_LA.max(1), LIGHT[colour],
        f"{name}, closest pair", linestyle=":", marker="",
      )  # fmt: skip
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, -0.05), min(1.02, max(high, 0.25)))
    head_axis(ax, "cosine")
    ax.set_xlabel("layer", labelpad=2)
    reference_line(ax, 0.0, "unrelated", below=True)
    legend(ax, 2 if narrow else 4)

  outputs, weights = pairs(result.outputs_LEE), pairs(result.weights_LEE)
  title = (
    f"Experts' outputs have cosine {outputs.mean():.2f} on average, their "
    f"weights {weights.mean():.2f}"
  )
  note = (
    "Cosine between two experts of a layer, over all pairs: of their weights, "
    f"and of what they compute from the same {result.num_tokens} tokens. 1 is "
    "the same expert twice; unrelated experts are at 0, the dashed line."
  ) + _attention_note(result.routers)
  return Chart("similarity", title, note, draw, (FULL, 320), (348, 320))


def layer_numbers(routers: Sequence[str]) -> np.ndarray:
  """[L] the layer that each router belongs to."""
  return np.array([int(name.split()[1]) for name in routers])


def attention_routers(routers: Sequence[str]) -> np.ndarray:
  """[L] whether it is one of attention experts."""
  return np.array([name.endswith("attention") for name in routers])


def _attention_note(routers: Sequence[str]) -> str:
  """What the open dots are, where there are any."""
  both = attention_routers(routers).any()
  return " Open dots are attention experts." if both else ""


def checkpoint_axis(
  ax: Any, steps_M: np.ndarray, names_M: Sequence[str]
) -> np.ndarray:
  """Places of checkpoints: by step, or in a row if they are of several runs."""
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  of_one_run = list(names_M) == [step_label(step) for step in steps_M]
  if not of_one_run or not (np.diff(steps_M) > 0).all():
    ax.set_xlabel("checkpoint", labelpad=2)
    x = np.arange(len(steps_M))
    ax.set_xticks(x, [short_name(name, 16) for name in names_M])
    ax.set_xlim(-0.3, len(steps_M) - 0.7)
    return x
  ax.set_xlabel("step", labelpad=2)
  ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_count(x)))
  ax.set_xlim(min(0, steps_M[0]), steps_M[-1] * 1.015)
  return steps_M


def _panels(figure: Any, narrow: bool, sharey: bool) -> Any:
  """Two: beside each other, or one above the other."""
  shape = (2, 1) if narrow else (1, 2)
  return figure.subplots(*shape, sharey=sharey, squeeze=False).ravel()


def _chance_line(ax: Any, x: np.ndarray, chance_M: np.ndarray) -> None:
  """Dashed, with its value or its range written at the last checkpoint."""
  low, high = (f"{100 * f(chance_M):.3g}" for f in (np.min, np.max))
  values = high if low == high else f"{low} to {high}"
  ax.plot(
    x, chance_M, color=LIGHT["soft"], linewidth=1.0, linestyle=(0, (4, 3))
  )
  falls = chance_M[0] > chance_M[-1] + 0.02  # through a text above it
  note_on_line(ax, chance_M[-1], f"chance {values}\u00a0%", below=falls)


def _share_axis(ax: Any, name: str) -> None:
  from matplotlib.ticker import PercentFormatter

  ax.set_ylim(0, 1.06)
  ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
  ax.yaxis.set_major_formatter(PercentFormatter(1.0))
  ax.tick_params(labelleft=True)
  head_axis(ax, name)


def _router_lines(
  ax: Any, routers: Sequence[str], x: np.ndarray, values_ML: np.ndarray
) -> None:
  """A line a router, coloured by depth; attention experts dashed."""
  colours = _ramp(len(routers))
  for name, colour, values_M in zip(routers, colours, values_ML.T):
    dashed = name.endswith("attention")
    ax.plot(
      x, values_M, color=colour, label=name, linewidth=1.6, marker="o",
      markersize=3.2, linestyle=(0, (4, 1.5)) if dashed else "-", clip_on=False,
    )  # fmt: skip


def _depth_key(figure: Any, axes: Any, routers: Sequence[str]) -> None:
  """Names of few lines, a colour bar of many."""
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import LinearSegmentedColormap, Normalize

  if len(routers) <= 8:
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
      handles, names, loc="outside upper right", ncol=min(4, len(routers)),
      handlelength=1.3, columnspacing=1.2,
    )  # fmt: skip
    return
  layers = layer_numbers(routers)
  bar = figure.colorbar(
    ScalarMappable(
      Normalize(layers[0], layers[-1]),
      LinearSegmentedColormap.from_list("depth", DEPTH_COLOURS),
    ),
    ax=list(axes), aspect=30, pad=0.01,
  )  # fmt: skip
  bar.outline.set_visible(False)
  dashed = attention_routers(routers).any()
  bar.set_label("layer (attention experts dashed)" if dashed else "layer")


def _over_layers(
  ax: Any, routers: Sequence[str], values_L: np.ndarray, colour: str,
  label: str, **style: Any,
) -> None:  # fmt: skip
  """A curve over layers; attention experts have another, with open dots."""
  from matplotlib.ticker import MaxNLocator

  layers, attention = layer_numbers(routers), attention_routers(routers)
  style = {"marker": "o", "markersize": 4.0} | style
  for kind in (False, True):
    mine = attention == kind
    if mine.any():
      face = {"markerfacecolor": LIGHT["card"]} if kind else {}
      first = kind == attention.all()  # one entry in the legend for both
      name = label if first else f"_{label}"
      ax.plot(
        layers[mine], values_L[mine], color=colour, label=name, **style, **face
      )
  ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
  ax.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)


def _ramp(count: int) -> list[Any]:
  from matplotlib.colors import LinearSegmentedColormap, to_hex

  ramp = LinearSegmentedColormap.from_list("depth", DEPTH_COLOURS)
  return [to_hex(ramp(x)) for x in np.linspace(0, 1, count)]


def _some(count: int, most: int) -> np.ndarray:
  """Indices of all, or of `most` from the first to the last."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round()).astype(
    int
  )
