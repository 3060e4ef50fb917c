# SPDX-License-Identifier: Apache-2.0
"""Pictures with a place for each expert: heat maps and bars.

`M` counts checkpoints, `U` domains.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.analysis.measures import (
  CoActivation,
  DomainSpecialisation,
  Load,
  strongest_pair,
)
from moejax.analysis.similarities import Similarity, pairs
from moejax.report.charts import (
  FULL,
  Chart,
  percent,
)
from moejax.report.style import LIGHT, load_colour_map, short_name

# Heat maps of experts show this many at most, those of the highest values.
MAX_EXPERTS = 32
# Bars of so many experts all have their number below.
MAX_NUMBERED = 12


def shown_routers(count: int, one: int | None = None) -> np.ndarray:
  """The first, the middle (or `one` that must be there) and the last one."""
  middle = (count - 1) // 2 if one in (None, 0, count - 1) else one
  return np.unique([0, middle, count - 1])


def co_activation_chart(result: CoActivation) -> Chart:
  """Heat maps of the experts with the highest scores."""
  chance = float(np.nanmean(result.chance_L))
  closest = map(strongest_pair, result.share_LEE, result.count_LE)
  router, pair = max(
    ((i, found) for i, found in enumerate(closest) if found is not None),
    key=lambda found: found[1].excess,
  )
  shown = shown_routers(len(result.routers), router)
  panels = [strongest(result.share_LEE[i]) for i in shown]
  high = max(
    [2 * chance, *(np.nanmax(share, initial=0) for _, share in panels)]
  )

  def draw(figure: Any, narrow: bool) -> None:
    names = [result.routers[i] for i in shown]
    axes, image = _expert_maps(figure, narrow, names, panels, (0, chance, high))
    bar = _bar(figure, image, axes, narrow)
    bar.set_ticks(
      [0, chance, high],
      labels=["0\u00a0%", f"chance {100 * chance:.3g}\u00a0%", percent(high)],
    )
    for ax in axes:
      ax.set_xlabel("expert j", labelpad=2)
    axes[0].set_ylabel("expert i", labelpad=2)

  title = (
    f"The closest pair is in {result.routers[router]}: expert {pair.j} has "
    f"{percent(pair.share)} of expert {pair.i}'s tokens too, and "
    f"{percent(pair.others)} of the other experts'"
  )
  note = (
    "Co-activation: of the tokens that expert i (row) gets, the share that "
    "expert j (column) gets as well. Experts chosen independently of one "
    f"another are at {_chance_of_pairs(result)}, the middle of the scale: blue "
    "pairs avoid each other, orange ones work together; a column that is "
    "orange from top to bottom is a busy expert. White: an expert with itself, "
    f"or rows of experts without a token.{_of_layers(result.routers, shown)}"
  )
  if result.share_LEE.shape[-1] > MAX_EXPERTS:
    note += f" The {MAX_EXPERTS} experts with the strongest pairs."
  return Chart("co_activation", title, note, draw, (FULL, 430), (348, 980))


def _of_layers(routers: Sequence[str], shown: np.ndarray) -> str:
  """Says that there are more of them than a picture has."""
  if len(shown) == len(routers):
    return ""
  return (
    f" Shown are {len(shown)} of {len(routers)} routers; the tables have all."
  )


def _chance_of_pairs(result: CoActivation) -> str:
  """Its value, and how it is counted."""
  chance_L = result.chance_L[~np.isnan(result.chance_L)]
  others_L = chance_L * (result.share_LEE.shape[-1] - 1)
  value = f"{100 * chance_L.mean():.3g}\u00a0%"
  if np.allclose(others_L, round(others_L.mean()), rtol=1e-9):
    return f"(k - 1)/(E - 1) = {value}"
  return (
    f"{value}, the mean over routers (counted from pairs: how many others the "
    "token of an expert has on average, over E - 1; tokens of many experts "
    "count for more than in the mean k)"
  )


def domain_chart(result: DomainSpecialisation) -> Chart:
  """Bars of experts: a row a domain, a column a layer."""
  U, _, E = result.share_ULE.shape
  u, i, e = _most_special(result)
  shown = shown_routers(len(result.routers), i)
  ticks = _ticks_over(float(result.share_ULE[:, shown].max()))
  labels = [f"{100 * x:.3g}\u00a0%" for x in ticks]

  def draw(figure: Any, narrow: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    shape = (U * len(shown), 1) if narrow else (U, len(shown))
    axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    places = [(row, layer) for row in range(U) for layer in shown]
    for ax, (row, layer) in zip(axes.flat, places):
      _domain_bars(ax, result, row, layer)
      ax.set_ylim(0, 1.02 * ticks[-1])
      ax.set_yticks(ticks, labels)
      if E <= MAX_NUMBERED:
        ax.set_xticks(range(E))
      else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
      ax.set_xlim(-0.6, E - 0.4)
    for ax in axes[-1]:
      ax.set_xlabel("expert", labelpad=2)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(
      handles, names, loc="outside upper left", ncol=1 if narrow else 2,
      handlelength=2.2, columnspacing=1.6,
    )  # fmt: skip

  note = (
    "Domain specialisation: of each domain's tokens, the share that has the "
    "expert among its k. A router that takes no notice of the domain has the "
    f"same bars in each row; an even one has all at k/E{_mean_k(result)}, the "
    "dashed line (orange bars are above it, blue ones below)."
  )
  if U > 1:
    note += (
      " What an expert specialises in is told by how far its bar is from the "
      "black mark, its own mean over domains; a bar that is as high in each "
      "row is load."
    )
  note += _of_layers(result.routers, shown)
  return Chart(
    "domains", _domain_title(result, u, i, e), note, draw,
    (FULL, 84 + 105 * U), (348, 100 + 92 * U * len(shown)),
  )  # fmt: skip


def _most_special(result: DomainSpecialisation) -> tuple[int, int, int]:
  """Domain, router and expert that are furthest from the expert's mean.

  Of one domain, those of the highest share.
  """
  far_ULE = np.abs(result.deviation_ULE)
  if len(result.domains) == 1:
    far_ULE = result.share_ULE
  u, i, e = np.unravel_index(far_ULE.argmax(), far_ULE.shape)
  return int(u), int(i), int(e)


def _domain_title(result: DomainSpecialisation, u: int, i: int, e: int) -> str:
  gets = (
    f"Expert {e} of {result.routers[i]} gets "
    f"{percent(result.share_ULE[u, i, e])} of the tokens of "
    f"{short_name(result.domains[u])}"
  )
  if len(result.domains) == 1:
    return (
      f"{gets}, chance is {100 * result.chance_L[i]:.3g}\u00a0%; one domain "
      "tells no specialisation from load"
    )
  return f"{gets}; its mean over domains is {percent(result.mean_LE[i, e])}"


def _domain_bars(
  ax: Any, result: DomainSpecialisation, row: int, layer: int
) -> None:
  """One domain and layer: bars, chance, and each expert's mean over domains."""
  share_E, chance = result.share_ULE[row, layer], result.chance_L[layer]
  experts = np.arange(len(share_E))
  colours = [LIGHT["orange" if x > chance else "blue"] for x in share_E]
  ax.bar(experts, share_E, color=colours, width=0.85)
  low, high = (f"{100 * f(result.chance_L):.3g}" for f in (np.min, np.max))
  values = high if low == high else f"{low} to {high}"
  ax.axhline(
    chance, color=LIGHT["ink"], linewidth=1.0, linestyle=(0, (4, 3)),
    label=f"chance: k/E = {values}\u00a0%",
  )  # fmt: skip
  if len(result.domains) > 1:
    ax.hlines(
      result.mean_LE[layer], experts - 0.46, experts + 0.46,
      color=LIGHT["ink"], linewidth=1.8, label="the expert's mean over domains",
    )  # fmt: skip
  name = f"{short_name(result.domains[row])}, {result.routers[layer]}"
  ax.set_title(name, loc="left", pad=3, color=LIGHT["soft"], fontsize=10.5)


def _ticks_over(top: float) -> np.ndarray:
  """From 0 to 100 % at most, few; the highest bar is not above the last."""
  from matplotlib.ticker import MaxNLocator

  top = top or 1.0  # of routers that chose no expert
  ticks = MaxNLocator(3, steps=[1, 2, 2.5, 4, 5, 10]).tick_values(0, top)
  return ticks if ticks[-1] <= 1 else np.array([0.0, 0.5, 1.0])


def _mean_k(result: DomainSpecialisation) -> str:
  """Said where k is no whole number, or not the same in all layers."""
  k_L = result.chance_L * result.share_ULE.shape[-1]
  if np.allclose(k_L, round(k_L[0]), rtol=1e-9):
    return ""
  return " (k: the layer's mean number of experts a token)"


def load_chart(result: Load) -> Chart:
  """All experts of all layers at the last checkpoint."""
  load_LE = result.load_MLE[-1]
  L, E = load_LE.shape

  def draw(figure: Any, narrow: bool) -> None:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    ax = figure.subplots()
    image = ax.imshow(
      np.log2(np.maximum(load_LE, 2.0**-20)), aspect="auto",
      cmap=load_colour_map(), norm=Normalize(-3, 3), interpolation="none",
    )  # fmt: skip
    _bare(ax)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.set_xlabel("expert", labelpad=2)
    step = -(-L // (18 if L > 18 else L))
    ax.set_yticks(np.arange(0, L, step), result.routers[::step])
    bar = _bar(figure, image, [ax], narrow)
    bar.set_ticks(range(-3, 4), labels=["≤ 1/8", "1/4", "1/2", "1", "2×", "4×",
                                        "≥ 8×"])  # fmt: skip
    bar.set_label("load ÷ fair share")

  router, e = np.unravel_index(load_LE.argmax(), load_LE.shape)
  starved = int((load_LE < 0.1).sum())
  title = (
    f"Expert {e} of {result.routers[router]} carries "
    f"{load_LE[router, e]:.2f}× its fair share; {starved} of {L * E} less than "
    "a tenth"
  )
  note = (
    f"Load: each expert's share of its layer's assignments over 1/E, of "
    f"{short_name(result.names_M[-1])}. Even routing is light everywhere (1); "
    "orange experts are busier, blue ones idler."
  )
  dead = [
    f"{e} of {name}"
    for name, load_E in zip(result.routers, load_LE)
    if load_E.any()
    for e in np.flatnonzero(load_E == 0)
  ]
  if dead:
    more = f" and {len(dead) - 6} more" if len(dead) > 6 else ""
    note += f" Without any token: expert {', '.join(dead[:6])}{more}."
  if idle := [n for n, x in zip(result.routers, load_LE.any(1)) if not x]:
    note += f" No token went to any expert of {', '.join(idle)}."
  height = 110 + max(60, min(18, max(10, 400 // L)) * L)
  return Chart("load", title, note, draw, (FULL, height), (348, height))


def similarity_map_chart(result: Similarity) -> Chart:
  """Outputs of all pairs, in three layers."""
  router = int(pairs(result.outputs_LEE).max(1).argmax())
  shown = shown_routers(len(result.routers), router)
  panels = []
  for i in shown:
    cosine_EE = result.outputs_LEE[i].astype(float)
    np.fill_diagonal(cosine_EE, np.nan)
    panels.append(strongest(cosine_EE))
  high = max(0.1, *(np.nanmax(np.abs(x), initial=0) for _, x in panels))

  def draw(figure: Any, narrow: bool) -> None:
    names = [result.routers[i] for i in shown]
    axes, image = _expert_maps(figure, narrow, names, panels, (-high, 0, high))
    bar = _bar(figure, image, axes, narrow)
    bar.set_ticks(
      [-high, 0, high],
      labels=[f"{-high:.2f}", "0: unrelated", f"{high:.2f}"],
    )
    for ax in axes:
      ax.set_xlabel("expert", labelpad=2)
    axes[0].set_ylabel("expert", labelpad=2)

  cosine_EE = result.outputs_LEE[router] - 2 * np.eye(
    result.outputs_LEE.shape[-1]
  )
  i, j = np.unravel_index(cosine_EE.argmax(), cosine_EE.shape)
  title = (
    f"Experts {i} and {j} of {result.routers[router]} compute the most alike: "
    f"cosine {cosine_EE[i, j]:.2f}"
  )
  note = (
    "Mean cosine between two experts' outputs for the same tokens. 1 would be "
    "the same expert twice; unrelated experts are at 0, the middle of the "
    f"scale. White: an expert with itself.{_of_layers(result.routers, shown)}"
  )
  return Chart("similarity_map", title, note, draw, (FULL, 430), (348, 980))


def strongest(values_EE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The experts of the highest values (NaN is none), and the values among them.

  Pair by pair from the highest value, which `argmax` finds, until there are
  `MAX_EXPERTS`: the partner of a shown expert's best value is shown too, even
  if the partner's own row is low.
  """
  values = np.where(np.isnan(values_EE), -np.inf, values_EE)
  order = np.argsort(-values, axis=None, kind="stable")
  experts = np.stack(np.unravel_index(order, values.shape), axis=1).ravel()
  kept, first = np.unique(experts, return_index=True)
  kept = np.sort(kept[np.argsort(first)[:MAX_EXPERTS]])
  return kept, values_EE[np.ix_(kept, kept)]


def _expert_maps(
  figure: Any, narrow: bool, names: Sequence[str],
  panels: Sequence[tuple[np.ndarray, np.ndarray]],
  scale: tuple[float, float, float],
) -> tuple[Any, Any]:  # fmt: skip
  """Heat maps beside each other, on one scale (low, chance, high)."""
  from matplotlib.colors import TwoSlopeNorm

  shape = (len(panels), 1) if narrow else (1, len(panels))
  axes = figure.subplots(*shape, squeeze=False).ravel()
  if engine := figure.get_layout_engine():  # not of a part of a figure
    engine.set(h_pad=0.08)  # square maps shrink, and labels leave the picture
  low, middle, high = scale
  middle = min(max(middle, low + 1e-9), high - 1e-9)
  for ax, name, (experts, values) in zip(axes, names, panels):
    image = ax.imshow(
      values, cmap=load_colour_map(), norm=TwoSlopeNorm(middle, low, high),
      interpolation="none",
    )  # fmt: skip
    _bare(ax)
    step = -(-len(experts) // 16)
    places = np.arange(0, len(experts), step)
    ax.set_xticks(places, experts[::step], rotation=90 if step > 1 else 0)
    ax.set_yticks(places, experts[::step])
    ax.tick_params(labelsize=9)
    ax.set_title(name, loc="left", pad=4, color=LIGHT["soft"], fontsize=10.5)
  return axes, image


def _bar(figure: Any, image: Any, axes: Any, narrow: bool) -> Any:
  bar = figure.colorbar(
    image, ax=list(axes), location="top", aspect=34 if narrow else 60,
    shrink=1.0 if narrow else 0.5, anchor=(0.0, 0.5),
  )  # fmt: skip
  bar.ax.tick_params(length=0, pad=2)
  bar.outline.set_visible(False)
  return bar


def _bare(ax: Any) -> None:
  """An image needs no grid and no frame."""
  ax.grid(False)
  ax.spines[:].set_visible(False)
