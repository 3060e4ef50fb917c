# SPDX-License-Identifier: Apache-2.0
"""The results in words: tables for people, a dictionary for JSON."""

import dataclasses
import textwrap
from typing import Any

from moejax.progress import format_count
from moejax.scaling.fit import (
  CONFIDENCE,
  Estimate,
  Optimum,
  ScalingFit,
  loss_law_estimates,
  optima,
  power_law_estimates,
)
from moejax.scaling.isoflop import GAP, valley_bias
from moejax.scaling.laws import HUNYUAN_LARGE
from moejax.scaling.sweep import PlannedPoint, scientific

METHODS = {
  "isoflop": "IsoFLOP valleys",
  "parametric": "parametric loss",
  "hunyuan_large": "Hunyuan-Large's laws",
  "chinchilla": "Chinchilla's loss",
  "chinchilla_refitted": "the same, refitted",
}
ODD_SHAPE = 1.5  # in width per layer, over the config's: beyond it is said
ODD_COMPUTE = 0.1  # relative error of C = K N^p D
COUNT_WORDS = {
  "active": "active parameters, embedding tables included",
  "non-embedding": "active parameters without embedding tables",
}


def describe_fit(fit: ScalingFit, budgets: list[float]) -> str:
  """All results as tables, at most 88 wide."""
  points, tried = fit.points, fit.points.flops
  lines = [
    f"{len(points)} points of {scientific(tried.min())} to "
    f"{scientific(tried.max())} FLOPs; N counts {COUNT_WORDS[fit.count]}",
    f"their compute: C = {fit.compute.coefficient:.4g} N^"
    f"{fit.compute.exponent:.4g} D, within {100 * fit.compute_error:.1f}%",
    f"intervals: {CONFIDENCE:.0%}, {fit.resamples} resamples, seed {fit.seed}",
    "",
  ]
  if fit.isoflop is not None:
    lines += [*_valleys(fit), "", *_power_laws(fit), ""]
  if fit.parametric is not None:
    lines += [*_loss_law(fit), ""]
  for flops in budgets:
    lines += [*_optima(fit, flops), ""]
  notes = [*(f"not fitted: {p}" for p in fit.problems), *notes_of(fit)]
  for note in notes:
    lines += textwrap.wrap(f"note: {note}", 88, subsequent_indent="  ")
  return "\n".join(lines).rstrip()


def _valleys(fit: ScalingFit) -> list[str]:
  lines = [
    f"{'FLOPs':>10}{'points':>8}{'sizes tried':>19}{'N_opt':>9}{'D_opt':>9}"
    f"{'loss':>8}"
  ]
  for v in fit.isoflop.valleys:
    sizes = " to ".join(format_count(x) for x in v.sizes)
    start = f"{scientific(v.flops):>10}{v.num_points:>8}{sizes:>19}"
    if v.problem:
      lines.append(f"{start}  {v.problem}")
      continue
    lines.append(
      f"{start}{format_count(v.params):>9}{format_count(v.tokens):>9}"
      f"{v.loss:>8.3f}"
    )
  return lines


def _power_laws(fit: ScalingFit) -> list[str]:
  lines = []
  for name, letter in (("params", "N"), ("tokens", "D")):
    law = getattr(fit.isoflop.frontier, name)
    drawn = fit.isoflop.resampled
    found = power_law_estimates(law, drawn and getattr(drawn, name))
    ours = f"{letter}_opt = {law.coefficient:.3g} C^{law.exponent:.4g}"
    lines.append(f"{ours:<26}{_range('exponent', found['exponent'])}")
  if fit.count == "active":
    n, d = HUNYUAN_LARGE.params, HUNYUAN_LARGE.tokens
    lines.append(
      f"to compare, Hunyuan-Large: N_opt = {n.coefficient} C^{n.exponent}, "
      f"D_opt = {d.coefficient} C^{d.exponent}"
    )
  return lines


def _loss_law(fit: ScalingFit) -> list[str]:
  law = fit.parametric.law
  found = loss_law_estimates(fit.parametric)
  ratio = fit.points.loss / fit.parametric.predicted - 1
  worst = abs(ratio).argmax()
  return [
    f"L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4g} + {law.B:.4g} / "
    f"D^{law.beta:.4g}",
    *(f"  {_range(name, estimate)}" for name, estimate in found.items()),
    f"  {fit.parametric.agreeing} of {fit.parametric.starts} starts end here; "
    f"largest miss {100 * ratio[worst]:+.2g}% ({fit.points.names[worst]})",
  ]


def _optima(fit: ScalingFit, flops: float) -> list[str]:
  rows = optima(fit, flops)
  head = f"compute-optimal at {scientific(flops)} FLOPs"
  if not rows:
    return [f"{head}: no fit tells it"]
  return [
    head,
    f"  {'':<20}{'N':>23}{'D':>23}{'loss':>7}{'extrapolated':>14}",
    *(_optimum(row) for row in rows),
  ]


def _optimum(row: Optimum) -> str:
  loss = "" if row.loss is None else f"{row.loss.value:.3f}"
  cells = f" {_counts(row.params):>22} {_counts(row.tokens):>22} {loss:>6}"
  return f"  {METHODS[row.method]:<20}{cells}{_reach(row.beyond):>14}".rstrip()


def _reach(beyond: float | None) -> str:
  """Whether a fit is asked beyond its budgets; as near as GAP it is one."""
  if beyond is None:
    return ""
  times = max(beyond, 1 / beyond)
  if times <= GAP:
    return "no"
  shown = f"{times:.3g}" if times < 1000 else scientific(times, 2)
  return f"{shown}x {'above' if beyond > 1 else 'below'}"


def _counts(estimate: Estimate) -> str:
  value = format_count(estimate.value)
  if estimate.low is None:
    return value
  ends = (format_count(x) for x in (estimate.low, estimate.high))
  return f"{value} ({' to '.join(ends)})"


def _range(name: str, estimate: Estimate) -> str:
  value = f"{name} {estimate.value:.4g}"
  if estimate.low is None:
    return value
  return f"{value} ({estimate.low:.4g} to {estimate.high:.4g})"


def notes_of(fit: ScalingFit) -> list[str]:
  """What a reader of the numbers should know beside them."""
  notes = list(fit.points.notes)
  if fit.count != "active":
    notes.append(
      "published laws count N with embedding tables, so none is told here"
    )
  if fit.parametric is not None:
    notes += fit.parametric.notes
    if not fit.parametric.tells_optimum:
      notes.append("so the parametric law tells no optimum")
    elif fit.compute_error > ODD_COMPUTE:
      notes.append(
        f"C = K N^p D misses a point by {100 * fit.compute_error:.0f}%, so the "
        "parametric law's optimum is rough; leave odd shapes out"
      )
  if fit.isoflop is not None:
    notes += _isoflop_notes(fit)
  return notes


def _isoflop_notes(fit: ScalingFit) -> list[str]:
  notes = []
  used = [v for v in fit.isoflop.valleys if not v.problem]
  if len(used) == 2:
    notes.append(
      "two valleys give a line, and nothing tells if a third lies on it; try "
      "another budget"
    )
  if fit.isoflop.resampled is None and not fit.isoflop.failed:
    notes.append(
      "no interval of the valleys: three sizes a budget leave nothing to tell "
      "the noise from; try five"
    )
  if fit.parametric is not None and fit.parametric.tells_optimum:
    bias = valley_bias(fit.points, fit.parametric.law, fit.isoflop)
    notes.append(
      "on the parametric law's own losses, parabolas would put N_opt "
      f"{100 * min(bias):+.1f}% to {100 * max(bias):+.1f}% off; intervals do "
      "not hold this"
    )
  if fit.isoflop.failed:
    then = "and are left out: the intervals are too narrow"
    if fit.isoflop.resampled is None:
      then = "so they have no interval; try more sizes, further apart"
    notes.append(
      f"{fit.isoflop.failed} of {fit.resamples} resamples had a budget without "
      f"a valley, {then}"
    )
  return notes


def fit_record(fit: ScalingFit, budgets: list[float]) -> dict[str, Any]:
  """All results as plain values; what is not known is None."""
  isoflop, parametric = fit.isoflop, fit.parametric
  record: dict[str, Any] = {
    "points": len(fit.points),
    "params_count": fit.count,
    "confidence": CONFIDENCE,
    "resamples": fit.resamples,
    "seed": fit.seed,
    "compute": {
      **dataclasses.asdict(fit.compute),
      "largest_error": fit.compute_error,
    },
    "isoflop": None,
    "parametric": None,
    "notes": notes_of(fit),
    "problems": list(fit.problems),
  }
  if isoflop is not None:
    drawn = isoflop.resampled
    record["isoflop"] = {
      "valleys": [dataclasses.asdict(valley) for valley in isoflop.valleys],
      "failed_resamples": isoflop.failed,
    } | {
      f"{name}_opt": _plain(
        power_law_estimates(
          getattr(isoflop.frontier, name), drawn and getattr(drawn, name)
        )
      )
      for name in ("params", "tokens")
    }
  if parametric is not None:
    record["parametric"] = _plain(loss_law_estimates(parametric)) | {
      "tells_optimum": parametric.tells_optimum,
      "starts": parametric.starts,
      "starts_agreeing": int(parametric.agreeing),
    }
  record["budgets"] = [
    {
      "flops": flops,
      "optima": [dataclasses.asdict(row) for row in optima(fit, flops)],
    }
    for flops in budgets
  ]
  return record


def _plain(estimates: dict[str, Estimate]) -> dict[str, Any]:
  return {k: dataclasses.asdict(v) for k, v in estimates.items()}


def describe_points(points: list[PlannedPoint]) -> str:
  """One line a point of a sweep."""
  rows = [(
    "point", "layers", "width", "active N", "tokens D", "D/N", "steps", "FLOPs",
    "6ND", "Hunyuan",
  )]  # fmt: skip
  for p in points:
    model = p.config.model
    rows.append((
      p.name, str(model.num_layers), str(model.d_model),
      format_count(p.active_params), format_count(p.tokens),
      format_count(p.tokens / p.active_params), str(p.steps),
      scientific(p.flops), f"{p.six_nd / p.flops:.2f}",
      f"{p.hunyuan_large / p.flops:.2f}",
    ))  # fmt: skip
  lines = _aligned(rows)
  lines += [
    "",
    "FLOPs: by the config's own count. 6ND and Hunyuan: 6 N D and",
    "Hunyuan-Large's 9.59 N D + 2.3e8 D, over it.",
  ]
  lines += [
    f"note: {p.name} and all of its size have {p.shape:.2g} times the config's "
    "width per layer; its loss may not lie on the others' law"
    for p in points
    if p.budget == points[0].budget and not 1 / ODD_SHAPE < p.shape < ODD_SHAPE
  ]
  return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
  """Lines of columns, two spaces apart; the first one is of names."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join([
      row[0].ljust(widths[0]),
      *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
    ])
    for row in rows
  ]  # fmt: skip
