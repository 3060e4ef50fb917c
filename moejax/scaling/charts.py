# SPDX-License-Identifier: Apache-2.0
"""Pictures of a fit: valleys, power laws, the loss surface, residuals."""

from typing import Any

import numpy as np

from moejax.progress import format_count
from moejax.report.charts import Chart, head_axis, number, reference_line
from moejax.report.style import LIGHT
from moejax.scaling.fit import ScalingFit, interval
from moejax.scaling.isoflop import Valley, budgets_of
from moejax.scaling.laws import CHINCHILLA_REFITTED, HUNYUAN_LARGE, PowerLaw
from moejax.scaling.sweep import scientific

# Small budgets light, large ones dark; light enough to see, not to vanish.
BUDGET_COLOURS = ("#8cc4ea", "#0b6bb3", "#0a2a57")
LOSS_COLOURS = ("#0a2a57", "#2171b5", "#9ecae1", "#f2f2ee")
AXIS = {
  "active": "active parameters N",
  "non-embedding": "active parameters N, without embedding tables",
}
HIGH, WIDE = (740, 500), (980, 420)


def make_charts(fit: ScalingFit, budgets: list[float]) -> list[Chart]:
  """All pictures that the fit has data for; `budgets` are marked."""
  charts = []
  if fit.isoflop is not None:
    charts += [isoflop_chart(fit), power_law_chart(fit, budgets)]
  if fit.parametric is not None:
    charts += [surface_chart(fit, budgets), residual_chart(fit)]
  return charts


def isoflop_chart(fit: ScalingFit) -> Chart:
  """Loss over N, one parabola a budget, its minimum marked."""
  valleys = fit.isoflop.valleys
  used = [v for v in valleys if not v.problem]
  groups = budgets_of(fit.points)

  def draw(figure: Any, narrow: bool) -> None:
    ax = figure.subplots()
    ax.set_xscale("log")
    for valley, group, colour in zip(valleys, groups, _colours(len(valleys))):
      params, loss = fit.points.params[group], fit.points.loss[group]
      label = f"{scientific(valley.flops, 2)}{' *' if valley.problem else ''}"
      style = {"color": colour, "zorder": 3, "clip_on": False}
      ax.plot(params, loss, "o", markersize=5, label=label, **style)
      if valley.coefficients is not None:
        x = np.geomspace(*valley.sizes, 200)
        line = "--" if valley.problem else "-"
        ax.plot(x, parabola(valley, x), line, color=colour, linewidth=1.6)
    ax.plot(
      [v.params for v in used], [v.loss for v in used], "D", markersize=10,
      color="none", markeredgecolor=LIGHT["orange"], markeredgewidth=2,
      zorder=5, label="valley",
    )  # fmt: skip
    _count_axis(ax.xaxis)
    ax.set_xlabel(AXIS[fit.count], labelpad=2)
    head_axis(ax, "validation loss, nats per token")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title="FLOPs",
              handletextpad=0.3, borderaxespad=0.0)  # fmt: skip

  first, last = used[0], used[-1]
  word = "grows" if last.params > first.params else "falls"
  title = (
    f"The best size {word} from {format_count(first.params)} at "
    f"{scientific(first.flops, 2)} FLOPs to {format_count(last.params)} at "
    f"{scientific(last.flops, 2)}"
  )
  note = (
    "A dot is a run; lines are parabolas in ln N, one a compute budget, drawn "
    "over the sizes tried; diamonds are their minima."
  )
  if len(used) < len(valleys):
    note += " * dashed: no minimum within the sizes tried, not used."
  return Chart("isoflop", title, note, draw, HIGH)


def power_law_chart(fit: ScalingFit, budgets: list[float]) -> Chart:
  """N_opt and D_opt over C, with intervals and published laws."""
  isoflop = fit.isoflop
  used = [v for v in isoflop.valleys if not v.problem]
  tried = [v.flops for v in used]
  low, high = min([*tried, *budgets]) / 1.5, max([*tried, *budgets]) * 1.5
  flops = np.geomspace(low, high, 100)

  def draw(figure: Any, narrow: bool) -> None:
    others = _published(flops) if fit.count == "active" else {}
    for ax, name, unit in zip(
      figure.subplots(1, 2), ("params", "tokens"), (AXIS[fit.count], "tokens D")
    ):
      ax.set_xscale("log")
      ax.set_yscale("log")
      law = getattr(isoflop.frontier, name)
      for (label, curves), line in zip(others.items(), ("--", ":")):
        ax.plot(flops, curves[name], line, color=LIGHT["soft"], linewidth=1.3,
                label=label)  # fmt: skip
      if isoflop.resampled is not None:
        drawn = getattr(isoflop.resampled, name)
        wide = PowerLaw(drawn.coefficient[None], drawn.exponent[None])
        band = interval(wide(flops[:, None]))
        ax.fill_between(flops, *band, color=LIGHT["blue"], alpha=0.2,
                        linewidth=0, label="95% of resamples")  # fmt: skip
      inside = (flops >= min(tried)) & (flops <= max(tried))
      ax.plot(flops, law(flops), color=LIGHT["blue"], linewidth=1.0)
      ax.plot(flops[inside], law(flops[inside]), color=LIGHT["blue"],
              linewidth=2.4, label="power law")  # fmt: skip
      ax.plot(tried, [getattr(v, name) for v in used], "D", markersize=7,
              color=LIGHT["orange"], markeredgecolor=LIGHT["card"],
              label="valleys", zorder=4)  # fmt: skip
      for budget in budgets:
        ax.axvline(budget, color=LIGHT["faint"], linewidth=1.0)
        ax.plot(budget, law(budget), "o", color=LIGHT["blue"], markersize=7)
      _flops_axis(ax.xaxis)
      _count_axis(ax.yaxis)
      ax.set_xlabel("compute C, FLOPs", labelpad=2)
      head_axis(ax, unit)
    figure.axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0),
                          borderaxespad=0.0)  # fmt: skip

  n, d = isoflop.frontier.params.exponent, isoflop.frontier.tokens.exponent
  title = f"Best sizes grow as C^{n:.3g}, their tokens as C^{d:.3g}"
  note = "Thick from valley to valley, thin beyond."
  if fit.count == "active":
    note += " Grey: published laws of other models and text, for comparison."
  if budgets:
    note += " Dots: the budgets asked for."
  return Chart("power_laws", title, note, draw, WIDE)


def surface_chart(fit: ScalingFit, budgets: list[float]) -> Chart:
  """Contours of the parametric law over N and D, with the runs on it."""
  law, points = fit.parametric.law, fit.points
  x = np.geomspace(points.params.min() / 1.5, points.params.max() * 1.5, 120)
  y = np.geomspace(points.tokens.min() / 1.5, points.tokens.max() * 1.5, 120)

  def draw(figure: Any, narrow: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ax = figure.subplots()
    ax.set_xscale("log")
    ax.set_yscale("log")
    losses = law(x[None, :], y[:, None])
    colours = LinearSegmentedColormap.from_list("loss", LOSS_COLOURS)
    shown = ax.contourf(x, y, losses, 16, cmap=colours)
    norm = {"cmap": colours, "norm": shown.norm}
    ax.scatter(points.params, points.tokens, c=points.loss, s=36, zorder=4,
               edgecolors=LIGHT["card"], linewidths=1.2, **norm)  # fmt: skip
    tried = points.flops
    flops = np.geomspace(tried.min() / 10, max([tried.max() * 10, *budgets]))
    if fit.parametric.tells_optimum:
      ax.plot(*law.optimum(flops, fit.compute), color=LIGHT["orange"],
              linewidth=2.2, label="compute-optimal")  # fmt: skip
      ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    for group in budgets_of(points):
      budget = np.exp(np.log(tried[group]).mean())
      ax.plot(x, fit.compute.tokens(budget, x), color=LIGHT["card"], alpha=0.7,
              linewidth=0.9, linestyle=(0, (4, 3)))  # fmt: skip
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    _count_axis(ax.xaxis)
    _count_axis(ax.yaxis)
    ax.grid(False)
    ax.set_xlabel(AXIS[fit.count], labelpad=2)
    head_axis(ax, "tokens D")
    bar = figure.colorbar(shown, ax=ax, pad=0.02)
    bar.set_label("loss, nats per token")
    bar.outline.set_visible(False)

  title = (
    f"L = {number(law.E)} + {number(law.A)} / N^{law.alpha:.3g} + "
    f"{number(law.B)} / D^{law.beta:.3g}"
  )
  note = (
    "Colour: the fitted loss; dots: runs, in the colour of their measured loss "
    "(a dot that stands out does not fit); dashed: equal compute."
  )
  return Chart("loss_surface", title, note, draw, HIGH)


def residual_chart(fit: ScalingFit) -> Chart:
  """Measured over fitted loss, by size and by compute."""
  points = fit.points
  miss = 100 * (points.loss / fit.parametric.predicted - 1)
  groups = budgets_of(points)

  def draw(figure: Any, narrow: bool) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    for ax, x in zip(axes, (points.params, points.tokens)):
      ax.set_xscale("log")
      for group, colour in zip(groups, _colours(len(groups))):
        label = scientific(np.exp(np.log(points.flops[group]).mean()), 2)
        ax.plot(x[group], miss[group], "o", color=colour, markersize=6,
                label=label, clip_on=False)  # fmt: skip
      _count_axis(ax.xaxis)
    reach = 1.25 * max(np.abs(miss).max(), 0.01)
    axes[0].set_ylim(-reach, reach)
    reference_line(axes[0], 0.0, "as fitted", left=True)
    axes[1].axhline(0.0, color=LIGHT["soft"], linewidth=1.0,
                    linestyle=(0, (4, 3)))  # fmt: skip
    head_axis(axes[0], "measured loss over fitted, %")
    axes[0].set_xlabel(AXIS[fit.count], labelpad=2)
    axes[1].set_xlabel("tokens D", labelpad=2)
    if len(groups) <= 10:
      axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0),
                     title="FLOPs", handletextpad=0.3)  # fmt: skip

  typical = np.sqrt(np.mean(miss**2))
  title = f"The parametric law misses the runs by {typical:.2g}% (r.m.s.)"
  note = (
    "A dot is a run. A slope or a bend over N or D means that the form does "
    "not fit, and that extrapolation will be off."
  )
  return Chart("residuals", title, note, draw, (900, 380))


def parabola(valley: Valley, params: np.ndarray) -> np.ndarray:
  """L of a budget's parabola at N."""
  c0, c1, c2 = valley.coefficients
  x = np.log(params / valley.centre)
  return c0 + c1 * x + c2 * x**2


def _published(flops: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
  chinchilla = CHINCHILLA_REFITTED.optimum(flops)
  return {
    "Hunyuan-Large": {
      "params": HUNYUAN_LARGE.params(flops),
      "tokens": HUNYUAN_LARGE.tokens(flops),
    },
    "Chinchilla, refitted": {"params": chinchilla[0], "tokens": chinchilla[1]},
  }


def _colours(count: int) -> list[Any]:
  from matplotlib.colors import LinearSegmentedColormap

  colours = LinearSegmentedColormap.from_list("budgets", BUDGET_COLOURS)
  return [colours(x) for x in np.linspace(0, 1, max(2, count))[:count]]


def _count_axis(axis: Any) -> None:
  """Ticks of a log axis as 300k, 1M, 3M."""
  _log_ticks(axis, lambda x, _: format_count(x))


def _flops_axis(axis: Any) -> None:
  _log_ticks(axis, lambda x, _: scientific(x, 2))


def _log_ticks(axis: Any, text: Any) -> None:
  from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

  low, high = axis.get_view_interval()
  subs = (1.0,) if high / low > 3e3 else (1.0, 3.0)
  if high / low < 30:
    subs = (1.0, 2.0, 5.0)
  axis.set_major_locator(LogLocator(subs=subs, numticks=9))
  axis.set_major_formatter(FuncFormatter(text))
  axis.set_minor_formatter(NullFormatter())
