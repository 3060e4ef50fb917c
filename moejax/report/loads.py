# SPDX-License-Identifier: Apache-2.0
"""Pictures of routing: who got how much, and how sure the router was."""

from typing import Any

import numpy as np

from moejax.progress import format_count
from moejax.report.charts import (
  FULL,
  Chart,
  draw_noisy,
  first_value,
  last_mean,
  legend,
  log_axis,
  number,
  percent,
  reference_line,
  step_axes,
)  # fmt: skip
from moejax.report.rundata import RunData
from moejax.report.series import bin_loads, finite
from moejax.report.style import LIGHT, MARK, load_colour_map

MAX_PANELS = 16
MAX_COLUMNS = 240
# The colour scale ends at this many times the fair share, and its inverse.
SCALES = (2.0, 4.0, 8.0)


def shown_layers(L: int) -> np.ndarray:
  """All layers, or MAX_PANELS of them from the first to the last."""
  if L <= MAX_PANELS:
    return np.arange(L)
  return np.linspace(0, L - 1, MAX_PANELS).round().astype(int)


def load_map_chart(run: RunData) -> Chart | None:
  """Load over fair share: one panel a layer, experts by steps."""
  if not len(run.loads):
    return None
  _, L, E = run.loads.shape
  edges, loads = bin_loads(run.load_steps, run.loads * E, MAX_COLUMNS)
  layers = shown_layers(L)
  scale = _colour_scale(loads)

  def draw(figure: Any, narrow: bool) -> None:
    columns = min(2 if narrow else 4, len(layers))
    rows = -(-len(layers) // columns)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True,
                           sharey=True)  # fmt: skip
    for ax in axes.flat[len(layers) :]:
      ax.set_axis_off()
    for ax, layer in zip(axes.flat, layers):
      image = _draw_panel(ax, edges, loads[:, layer], scale)
      ax.set_title(f"layer {run.moe_layers[layer]}", loc="left", pad=4,
                   color=LIGHT["soft"], fontsize=10.5)  # fmt: skip
    for ax in axes[:, 0]:
      ax.set_ylabel("expert", labelpad=2)
    for column in range(columns):
      used = [i for i in range(len(layers)) if i % columns == column]
      lowest = axes.flat[used[-1]]
      lowest.set_xlabel("step", labelpad=2)
      lowest.xaxis.set_tick_params(labelbottom=True)
    # A fraction of the panels' height, so that it is the same in pixels.
    _colour_bar(figure, image, axes, scale, narrow, 12 / (rows * (panel + 26)))

  wide_rows, narrow_rows = -(-len(layers) // 4), -(-len(layers) // 2)
  panel = 92 if E <= 32 else 112
  size = (FULL, 100 + wide_rows * (panel + (70 if wide_rows == 1 else 30)))
  narrow_size = (348, 110 + narrow_rows * (panel + 26))
  note = (
    "Each expert's share of its layer's assignments over the fair share 1/"
    f"{E}, by step. The last record is of step {run.load_steps[-1]:,}."
  )
  if len(layers) < L:
    note += f" {len(layers)} of {L} layers; all are in router_load.jsonl."
  return Chart("expert_load", _load_title(run), note, draw, size, narrow_size)


def _colour_scale(loads: np.ndarray) -> float:
  """The smallest of SCALES that holds nearly all of the picture."""
  powers = np.abs(np.log2(np.maximum(loads, 1 / SCALES[-1])))
  reach = np.nanquantile(powers, 0.97)
  fitting = [scale for scale in SCALES if np.log2(scale) >= reach]
  return fitting[0] if fitting else SCALES[-1]


def _load_title(run: RunData) -> str:
  _, _, E = run.loads.shape
  now, before = run.loads[-1] * E, run.loads[0] * E
  starved = int((now < 0.1).sum())
  if starved:
    return (
      f"{starved} of {now.size} experts get less than a tenth of their fair "
      "share"
    )
  text = f"Experts carry {now.min():.2f} to {now.max():.2f} of their fair share"
  if len(run.loads) > 1:
    text += f"; {before.min():.2f} to {before.max():.2f} at the start"
  return text


def _draw_panel(
  ax: Any, edges: np.ndarray, load_NE: np.ndarray, scale: float
) -> Any:
  """One layer; colours are even in the logarithm, so 1/2 mirrors 2."""
  from matplotlib.colors import Normalize
  from matplotlib.ticker import FuncFormatter, MaxNLocator

  E = load_NE.shape[1]
  limit = np.log2(scale)
  image = ax.imshow(
    np.log2(np.maximum(load_NE.T, 2.0**-20)), aspect="auto", origin="lower",
    extent=(edges[0], edges[-1], -0.5, E - 0.5), cmap=load_colour_map(),
    norm=Normalize(-limit, limit), interpolation="none",
  )  # fmt: skip
  ax.grid(False)
  ax.spines["bottom"].set_visible(False)
  # No tick at the top of a long scale: it would touch the panel above.
  ax.set_yticks([0, E - 1] if E < 16 else [0, E // 2])
  if len(load_NE) == 1:
    ax.set_xticks([edges.mean()])
  else:
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_count(x)))
  return image


def _colour_bar(
  figure: Any, image: Any, axes: Any, scale: float, narrow: bool, pad: float
) -> None:
  limit = int(np.log2(scale))
  bar = figure.colorbar(
    image, ax=axes, location="top", extend="both", aspect=34 if narrow else 60,
    shrink=1.0 if narrow else 0.5, anchor=(0.0, 0.5), pad=pad, extendfrac=0.04,
  )  # fmt: skip
  ticks = np.arange(-limit, limit + 1)
  names = [_ratio(t) for t in ticks]
  bar.set_ticks(ticks, labels=names)
  bar.ax.tick_params(length=0, pad=2)
  bar.outline.set_visible(False)
  # Dark in both schemes: the bar under it is light in both.
  bar.ax.axvline(0, color=MARK, linewidth=1.4)
  bar.ax.set_xlabel(
    "load ÷ fair share (1 = perfectly balanced)", labelpad=5, fontsize=10.5
  )


def _ratio(power: int) -> str:
  if power == 0:
    return "1"
  return f"{2**power}×" if power > 0 else f"1/{2**-power}"


def final_load_chart(run: RunData) -> Chart | None:
  """Each expert of each layer at the last record."""
  if not len(run.loads):
    return None
  _, L, E = run.loads.shape
  load_LE = run.loads[-1] * E

  def draw(figure: Any, narrow: bool) -> None:
    ax = figure.subplots()
    x = np.arange(L)
    ax.vlines(x, load_LE.min(1), load_LE.max(1), color=LIGHT["faint"],
              linewidth=1.5)  # fmt: skip
    ax.plot(
      np.repeat(x, E), load_LE.ravel(), "o", color=LIGHT["blue"],
      alpha=0.75 if E <= 16 else 0.35, markersize=5.5 if E <= 16 else 4,
      markeredgewidth=0,
    )  # fmt: skip
    named = x[:: max(1, L // 8)]
    ax.set_xticks(named, [run.moe_layers[i] for i in named])
    ax.set(xlim=(-0.6, L - 0.4), xlabel="layer")
    ax.set_ylim(0, max(1.15, 1.08 * load_LE.max()))
    reference_line(ax, 1.0, "fair share")

  worst = int(load_LE.max(1).argmax())
  title = (
    f"At the end, one expert of layer {run.moe_layers[worst]} carries "
    f"{load_LE[worst].max():.2f}× its share"
  )
  note = (
    f"Load ÷ fair share of each expert (dot) at step {run.load_steps[-1]:,}."
  )
  return Chart("final_load", title, note, draw)


def spread_chart(run: RunData) -> Chart | None:
  """How the loads of all experts spread, over steps."""
  if not len(run.loads):
    return None
  S, L, E = run.loads.shape
  keep = np.unique(np.linspace(0, S - 1, min(S, MAX_COLUMNS)).astype(int))
  steps, loads = run.load_steps[keep], run.loads[keep].reshape(-1, L * E) * E
  low, tenth, middle, ninth, high = np.nanquantile(
    loads, [0.0, 0.1, 0.5, 0.9, 1.0], axis=1
  )

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    style = {"color": LIGHT["blue"], "linewidth": 0}
    if S == 1:
      ax.vlines(steps, low, high, color=LIGHT["blue"], alpha=0.4, linewidth=4)
      ax.plot(steps, middle, "o", color=LIGHT["blue"], label="median")
    else:
      ax.fill_between(steps, low, high, alpha=0.15, label="all", **style)
      ax.fill_between(steps, tenth, ninth, alpha=0.35, label="middle 80 %",
                      **style)  # fmt: skip
      ax.plot(steps, middle, color=LIGHT["blue"], label="median")
    # The uneven first steps may leave the picture; the map above shows them.
    ax.set_ylim(0, max(1.5, 1.5 * np.median(high)))
    legend(ax)

  title = (
    f"The middle 80 % of experts carry {tenth[-1]:.2f} to {ninth[-1]:.2f}× "
    "their share"
  )
  note = "Load ÷ fair share, over all experts of all layers."
  return Chart("load_spread", title, note, draw)


def entropy_chart(run: RunData) -> Chart | None:
  """How undecided the router is."""
  key = "router/entropy"
  if key not in run.metrics:
    return None
  steps, values = run.metrics.steps, run.metrics[key]

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    draw_noisy(ax, steps, values, "blue", "entropy")
    ax.set_ylim(0, 1.12)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    reference_line(ax, 1.0, "uniform: no preference")

  last = last_mean(steps, values)
  title = f"Router entropy {percent(last)} of the uniform maximum"
  note = "Mean entropy of the router's softmax ÷ ln E; 0 is always sure."
  return Chart("router_entropy", title, note, draw)


def busiest_chart(run: RunData) -> Chart | None:
  """Load of the busiest expert."""
  key = "router/max_over_mean"
  if key not in run.metrics:
    return None
  steps, values = run.metrics.steps, run.metrics[key]

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    draw_noisy(
      ax, steps, np.where(values > 0, values, np.nan), "orange", "load"
    )
    _, y = finite(steps, values)
    if len(y) and y.max() > 6:
      log_axis(ax)
    high = ax.get_ylim()[1]
    # Room for the label under the line: curves end on it, not below.
    bottom = 0.8 if ax.get_yscale() == "log" else 1 - 0.14 * (high - 1)
    ax.set_ylim(bottom, high)
    reference_line(ax, 1.0, "perfectly even", below=True)

  title = (
    f"Busiest expert at {number(last_mean(steps, values))}× its fair share"
  )
  if len(steps) > 1:
    title += f" ({number(first_value(steps, values))}× at step {steps[0]})"
  note = "Largest expert load ÷ fair share, in the least even layer."
  return Chart("busiest_expert", title, note, draw)


def balance_chart(run: RunData) -> Chart | None:
  """The load-balancing loss."""
  key = "loss/balance"
  if key not in run.metrics:
    return None
  steps, values = run.metrics.steps, run.metrics[key]

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    draw_noisy(ax, steps, values, "purple", "balance")
    _, y = finite(steps, values)
    low = min(1.0, y.min(initial=1.0))
    high = max(y.max(initial=1.0), low + 0.02)
    ax.set_ylim(low - 0.14 * (high - low), high + 0.03 * (high - low))
    reference_line(ax, 1.0, "perfect balance", below=True)

  title = f"Balancing loss {number(last_mean(steps, values))}; 1 is perfect"
  note = "E · Σ share × mean probability, unweighted, mean over layers."
  return Chart("balance_loss", title, note, draw)


def router_z_chart(run: RunData) -> Chart | None:
  """The router z-loss."""
  key = "loss/router_z"
  if key not in run.metrics:
    return None
  steps, values = run.metrics.steps, run.metrics[key]

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    draw_noisy(ax, steps, values, "green", "z")
    ax.set_ylim(bottom=0)

  title = f"Router z-loss {number(last_mean(steps, values))}"
  note = "Mean squared logsumexp of the router's logits, unweighted."
  return Chart("router_z", title, note, draw)
