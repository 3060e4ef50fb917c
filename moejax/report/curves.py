# SPDX-License-Identifier: Apache-2.0
"""Curves over steps: loss, learning rate, gradients, speed and time."""

import re
from typing import Any

import numpy as np

from moejax.config import phase_at, schedule_stretches
from moejax.progress import format_count, format_seconds
from moejax.report.charts import (
  HERO,
  Chart,
  draw_noisy,
  first_value,
  last_mean,
  legend,
  log_axis,
  mark_phases,
  number,
  percent,
  reference_line,
  step_axes,
)  # fmt: skip
from moejax.report.rundata import RunData
from moejax.report.series import finite, smooth
from moejax.report.skipped import divergence
from moejax.report.style import LIGHT, short_name

# Perplexity of more than this says nothing, and its axis runs out of ticks.
MAX_PERPLEXITY_NATS = 14.0


def loss_chart(run: RunData) -> Chart | None:
  """Training and validation loss."""
  if "loss/xent" not in run.metrics:
    return None
  steps, loss = run.metrics.steps, run.metrics["loss/xent"]
  held_out = {
    label: found
    for key, label in (
      ("validation/xent", "validation"),
      ("validation_ema/xent", "validation of averaged weights"),
    )
    if len((found := _evaluated(run, key, 0, run.last_step))[0])
  }

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step, "" if narrow else "nats per token")
    _, ys = draw_noisy(ax, steps, loss, "blue", "training")
    # Spikes may leave the picture at its top; nothing leaves at the bottom.
    values = [ys, np.sort(loss[np.isfinite(loss)])[:1]]
    for (label, (x, y)), colour in zip(held_out.items(), ("orange", "green")):
      values.append(y)
      ax.plot(
        x, y, "-o", color=LIGHT[colour], label=label, clip_on=False,
        markeredgecolor=LIGHT["card"], markersize=6, zorder=3,
        linewidth=1.6, markevery=max(1, len(x) // 20),
      )  # fmt: skip
    known = np.concatenate(values)
    if len(known):
      low, high = known.min(), known.max()
      margin = max(0.06 * (high - low), 0.02 * abs(high), 1e-3)
      ax.set_ylim(low - margin, high + margin)
      _perplexity_axis(ax, narrow)
    mark_phases(ax, run.config, run.last_step)
    legend(ax)

  return Chart(
    "loss", _loss_title(run), "Cross entropy in nats per token: every step "
    "(faint) and running mean" + (", held-out text (dots)" if held_out else "")
    + ". Right axis: perplexity.", draw, HERO, (348, 262),
  )  # fmt: skip


def recent_chart(run: RunData) -> Chart | None:
  """The loss of the last half, at a scale that shows if it still falls."""
  if "loss/xent" not in run.metrics or len(run.metrics) < 20:
    return None
  last = run.metrics.steps >= run.last_step / 2
  steps, loss = finite(run.metrics.steps[last], run.metrics["loss/xent"][last])
  if len(loss) < 10:
    return None
  x, y = smooth(steps, loss)

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    draw_noisy(ax, steps, loss, "blue", "training")
    values = [y, np.quantile(loss, [0.02, 0.98])]
    at, held_out = _evaluated(run, "validation/xent", steps[0], steps[-1])
    if len(at):
      values.append(held_out)
      ax.plot(at, held_out, "-o", color=LIGHT["orange"], markersize=5.5,
              markeredgecolor=LIGHT["card"], label="validation", linewidth=1.4,
              clip_on=False, zorder=3)  # fmt: skip
    known = np.concatenate(values)
    margin = max(0.06 * np.ptp(known), 1e-3)
    ax.set_ylim(known.min() - margin, known.max() + margin)
    ax.set_xlim(steps[0], steps[-1])
    legend(ax)

  # Means of thirds of what is shown: less noisy than single ends of the curve.
  third = len(loss) // 3
  change = loss[-third:].mean() - loss[:third].mean()
  noise = np.std(loss - np.interp(steps, x, y)) * np.sqrt(2 / third)
  word = "fell" if change < 0 else "rose"
  title = f"In the last half the training loss {word} by {abs(change):.2g} nats"
  if abs(change) < 2 * noise:
    title = "No clear change of the training loss in the last half"
  note = "As above, steps of the last half only."
  return Chart("loss_recent", title, note, draw)


def _loss_title(run: RunData) -> str:
  steps, loss = run.metrics.steps, run.metrics["loss/xent"]
  diverged = divergence(run)
  if diverged is not None:
    return diverged[0].upper() + diverged[1:]
  if not np.isfinite(loss).any():
    return "No step has a finite loss"
  evals = run.evaluations
  if "validation/xent" in evals and len(evals) > 1:
    x, y = finite(evals.steps, evals["validation/xent"])
    if len(y) > 1:
      return f"Validation loss {_moved(y[0], y[-1])} by step {x[-1]:,}"
  if len(run.metrics) == 1:
    return f"Training loss {loss[0]:.3f} at the first step"
  moved = _moved(first_value(steps, loss), last_mean(steps, loss))
  return f"Training loss {moved} in {run.last_step:,} steps"


def _evaluated(
  run: RunData, key: str, first: int, last: int
) -> tuple[np.ndarray, np.ndarray]:
  """A held-out loss at steps first..last: dots are not clipped to the axes."""
  if key not in run.evaluations:
    return np.zeros(0, int), np.zeros(0)
  x, y = finite(run.evaluations.steps, run.evaluations[key])
  inside = (x >= first) & (x <= last)
  return x[inside], y[inside]


def _moved(before: float, after: float) -> str:
  verb = "fell" if after < before else "rose"
  return f"{verb} from {before:.2f} to {after:.3f}"


def _perplexity_axis(ax: Any, narrow: bool) -> None:
  """Perplexity of the same curve, with round numbers far enough apart."""
  low, high = ax.get_ylim()
  if high > MAX_PERPLEXITY_NATS:
    return
  ticks: list[float] = []
  for tick in sorted(d * 10.0**p for p in range(-1, 7) for d in (1, 2, 3, 5)):
    height = np.log(tick)
    apart = not ticks or height - np.log(ticks[-1]) > 0.1 * (high - low)
    if low <= height <= high and apart:
      ticks.append(tick)
  if len(ticks) < 2:
    return
  right = ax.twinx()
  right.set_ylim(low, high)
  right.grid(False)
  right.set_yticks(np.log(ticks), [format_count(tick) for tick in ticks])
  right.spines["right"].set_visible(False)
  if not narrow:
    right.set_ylabel("perplexity", rotation=270, va="bottom", fontsize=10.5)


def planned_rates(run: RunData) -> np.ndarray | None:
  """Learning rate of every step of the whole run, if the config tells."""
  if run.config is None:
    return None
  from moejax.optimizer import schedule_values

  return schedule_values(run.config)


def learning_rate_chart(run: RunData) -> Chart | None:
  """The whole planned schedule, the part done on top of it."""
  if "learning_rate" not in run.metrics:
    return None
  planned = planned_rates(run)
  steps, rates = run.metrics.steps, run.metrics["learning_rate"]

  def draw(figure: Any, narrow: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    ax = step_axes(figure, max(run.num_steps, run.last_step))
    if planned is not None:
      x = np.arange(1, len(planned) + 1)
      keep = np.unique(np.linspace(0, len(x) - 1, 1500).astype(int))
      ax.plot(x[keep], planned[keep], color=LIGHT["soft"], linewidth=1.4,
              linestyle=(0, (3, 2)), label="planned")  # fmt: skip
      ax.fill_between(x[keep], planned[keep], color=LIGHT["faint"], alpha=0.25,
                      linewidth=0)  # fmt: skip
    keep = np.unique(np.linspace(0, len(steps) - 1, 1500).astype(int))
    ax.plot(steps[keep], rates[keep], color=LIGHT["blue"], linewidth=2.2,
            label="done")  # fmt: skip
    ax.plot(steps[-1:], rates[-1:], "o", color=LIGHT["blue"], clip_on=False,
            markeredgecolor=LIGHT["card"], markersize=8, zorder=4)  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    mark_phases(ax, run.config, run.num_steps)
    legend(ax)

  note = "By step: the whole plan, and the part done."
  return Chart("learning_rate", _rate_title(run), note, draw)


def _rate_title(run: RunData) -> str:
  now = run.metrics["learning_rate"][-1]
  if run.config is None:
    return f"Learning rate {number(now)} at step {run.last_step:,}"
  if len(schedule_stretches(run.config)) > 1:
    phase = short_name(phase_at(run.config, run.last_step - 1).name)
    return f"Learning rate {number(now)} at step {run.last_step:,}, in {phase}"
  optimizer = run.config.optimizer
  _, decay = optimizer.schedule.lengths(run.num_steps)
  peak = number(optimizer.learning_rate)
  if decay:
    return f"Learning rate {peak}, decaying over the last {decay:,} steps"
  if optimizer.schedule.name != "wsd":
    return f"Learning rate {peak}, then {optimizer.schedule.name} decay"
  return f"Learning rate {peak} to the end"


def gradient_chart(run: RunData) -> Chart | None:
  """Global gradient norm and the clip."""
  if "grad_norm" not in run.metrics:
    return None
  steps, norm = run.metrics.steps, run.metrics["grad_norm"]
  clip = run.record["config"]["optimizer"]["clip_norm"]

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    positive = np.where(norm > 0, norm, np.nan)
    draw_noisy(ax, steps, positive, "purple", "norm", np.median)
    if np.isfinite(positive).any():
      log_axis(ax)
    if clip:
      reference_line(ax, clip, f"clipped above {number(clip)}")
    mark_phases(ax, run.config, run.last_step)

  _, y = finite(steps, norm)
  title = "No finite gradient norm"
  if len(y):
    title = f"Gradient norm {number(np.median(y[-max(5, len(y) // 30) :]))}"
    if clip:
      title += f"; clipped in {percent((y > clip).mean())} of steps"
  note = "Before clipping: every step (faint), running median."
  return Chart("gradient_norm", title, note, draw)


def median_rate(run: RunData, key: str) -> float | None:
  """Median of a rate without the first step, which compiles."""
  if key not in run.timing:
    return None
  values = run.timing[key]
  values = values[1:] if len(values) > 1 else values
  values = values[np.isfinite(values)]
  return float(np.median(values)) if len(values) else None


def throughput_chart(run: RunData) -> Chart | None:
  """Tokens per second by step."""
  median = median_rate(run, "tokens_per_second")
  if median is None:
    return None
  steps, rate = run.timing.steps, run.timing["tokens_per_second"]
  if len(steps) > 1:
    steps, rate = steps[1:], rate[1:]

  def draw(figure: Any, narrow: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    ax = step_axes(figure, run.last_step)
    _, ys = draw_noisy(ax, steps, rate, "green", "tokens/s", np.median)
    top = max(np.nanquantile(rate, 0.98), ys.max(initial=0.0), 1e-9)
    ax.set_ylim(0, 1.15 * top)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_count(y)))

  title = f"{format_count(median)} tokens/s"
  mfu = median_rate(run, "mfu")
  flops = median_rate(run, "model_flops_per_second")
  if mfu is not None:
    title += f", {percent(mfu)} of the hardware's peak"
  elif flops is not None:
    value = format_count(flops)
    prefix = value.lstrip("0123456789.")
    title += f", {value.removesuffix(prefix)} {prefix}FLOP/s"
  note = "Target tokens per second: each step, running median."
  return Chart("throughput", title, note, draw)


def time_chart(run: RunData) -> Chart | None:
  """Where the time went, from the first launch to the last step."""
  found = run.goodput
  if found is None or not found.total:
    return None
  total = found.total
  # Bars of nothing say nothing.
  split = {
    name: seconds
    for name, seconds in found.parts.items()
    if seconds >= 0.005 * total or name == "training steps"
  }

  def draw(figure: Any, narrow: bool) -> None:
    ax = figure.subplots()
    names = list(split)
    shares = np.array([split[name] for name in names]) / total
    colours = [LIGHT["green"]] + [LIGHT["orange"]] * (len(names) - 1)
    y = np.arange(len(names))
    ax.barh(y, shares, height=0.3, color=colours)
    ax.barh(y, 1.0 - shares, height=0.3, left=shares, color=LIGHT["grid"])
    for i, name in enumerate(names):
      text = f"{format_seconds(split[name])} · {percent(shares[i])}"
      style = {"textcoords": "offset points", "va": "bottom", "fontsize": 10.5}
      ax.annotate(name, (0, i - 0.15), (0, 3), color=LIGHT["ink"], **style)
      ax.annotate(text, (1, i - 0.15), (0, 3), color=LIGHT["soft"],
                  ha="right", **style)  # fmt: skip
    ax.set(xlim=(0, 1), ylim=(len(names) - 0.6, -0.75))
    ax.set_axis_off()

  title = f"Goodput: {percent(found.share)} of {format_seconds(total)}"
  note = "Share of the time since the first launch that went into each part."
  if found.launches > 1:
    note += (
      f" Launched {found.launches} times; {found.redone_steps:,} steps were "
      "computed again."
    )
  return Chart("time", title, note, draw)


def metric_chart(run: RunData, key: str) -> Chart | None:
  """Any other metric by step; None if it never changes."""
  _, y = finite(run.metrics.steps, run.metrics[key])
  if not len(y) or (len(y) > 1 and y.min() == y.max()):
    return None

  def draw(figure: Any, narrow: bool) -> None:
    ax = step_axes(figure, run.last_step)
    draw_noisy(ax, run.metrics.steps, run.metrics[key], "blue", key)

  last = last_mean(run.metrics.steps, run.metrics[key])
  name = re.sub(r"[^\w.-]+", "_", key)  # of files and of elements
  return Chart(name, f"{key} ended at {number(last)}",
               f"{key}: every step (faint), running mean.", draw)  # fmt: skip
