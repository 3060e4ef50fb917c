# SPDX-License-Identifier: Apache-2.0
"""Each measure's numbers as plain values: for a JSON file and for tables.

`summary` has what fits on a screen, `columns` every number, one row each.
"""

import csv
import functools
import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.analysis import measures
from moejax.analysis.similarities import Similarity, pairs
from moejax.files import write_atomically

Columns = Mapping[str, np.ndarray]

# Of tables.
SUFFIXES = (".parquet", ".csv")
# Significant digits of the JSON file; tables have all.
_DIGITS = 6


@functools.singledispatch
def summary(result: Any) -> dict[str, Any]:
  """The main numbers, lists by router in the order of `routers`."""
  raise TypeError(f"{type(result).__name__} is no measure")


@functools.singledispatch
def columns(result: Any) -> Columns:
  """All numbers as a long table."""
  raise TypeError(f"{type(result).__name__} is no measure")


def long_table(axes: dict[str, Any], values: dict[str, np.ndarray]) -> Columns:
  """Arrays of one shape as columns beside those of their axes' labels.

  Args:
    axes: the labels of each axis, in the arrays' order.
    values: arrays with these axes, or what broadcasts to them.
  """
  shape = tuple(len(labels) for labels in axes.values())
  places = np.indices(shape).reshape(len(shape), -1)
  labels = {
    name: np.asarray(list(known))[place]
    for (name, known), place in zip(axes.items(), places)
  }
  spread = {k: np.broadcast_to(v, shape).ravel() for k, v in values.items()}
  return labels | spread


def write_json(path: pathlib.Path, record: dict[str, Any]) -> None:
  """Writes numbers shortly, and NaN, which JSON lacks, as null."""
  write_atomically(path, json.dumps(_plain(record), indent=1) + "\n")


def read_domains(path: pathlib.Path) -> list[str]:
  """Names of the text that a summary is of; none if it is another's file."""
  try:
    return list(
      json.loads(path.read_text(encoding="utf-8"))["domains"]["domains"]
    )
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return []


def write_table(
  folder: pathlib.Path, name: str, table: Columns
) -> pathlib.Path:
  """Writes NAME.parquet; NAME.csv where pyarrow is not installed.

  Whole or not at all.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    path, lines = folder / f"{name}.csv", io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(table)
    writer.writerows(zip(*(column.tolist() for column in table.values())))
    write_atomically(path, lines.getvalue())
    return path
  path = folder / f"{name}.parquet"
  temporary = path.with_suffix(".parquet.tmp")
  arrays = {key: pyarrow.array(column) for key, column in table.items()}
  pyarrow.parquet.write_table(pyarrow.table(arrays), temporary)
  temporary.replace(path)
  return path


@summary.register
def _(result: measures.Saturation):
  return {
    "steps": result.steps_M, "checkpoints": result.names_M,
    "share": result.share_ML, "top_share": result.top_share_ML,
    "chance": result.chance_ML, "top_chance": result.top_chance_ML,
  }  # fmt: skip


@columns.register
def _(result: measures.Saturation):
  return long_table(
    {"checkpoint": result.names_M, "router": result.routers},
    {"step": result.steps_M[:, None],
     "share": result.share_ML, "top_share": result.top_share_ML,
     "chance": result.chance_ML, "top_chance": result.top_chance_ML},
  )  # fmt: skip


@summary.register
def _(result: measures.CoActivation):
  strongest = []
  for share_EE, count_E in zip(result.share_LEE, result.count_LE):
    pair = measures.strongest_pair(share_EE, count_E)
    strongest.append(
      dict.fromkeys(("expert", "other", "share", "others_share"))
      if pair is None
      else {"expert": pair.i, "other": pair.j, "share": pair.share,
            "others_share": pair.others}
    )  # fmt: skip
  return {"strongest_pair": strongest, "chance": result.chance_L}


@columns.register
def _(result: measures.CoActivation):
  E = range(result.share_LEE.shape[-1])
  return long_table(
    {"router": result.routers, "expert": E, "other": E},
    {"share": result.share_LEE, "tokens": result.count_LE[..., None],
     "chance": result.chance_L[:, None, None]},
  )  # fmt: skip


@summary.register
def _(result: measures.DomainSpecialisation):
  return {
    "domains": result.domains, "tokens": result.tokens_U,
    "largest_share": result.share_ULE.max(-1),
    "smallest_share": result.share_ULE.min(-1),
    "largest_deviation": np.abs(result.deviation_ULE).max((0, 2)),
    "chance": result.chance_L,
  }  # fmt: skip


@columns.register
def _(result: measures.DomainSpecialisation):
  return long_table(
    {"domain": result.domains, "router": result.routers,
     "expert": range(result.share_ULE.shape[-1])},
    {"share": result.share_ULE, "top_share": result.top_share_ULE,
     "chance": result.chance_L[None, :, None]},
  )  # fmt: skip


@summary.register
def _(result: measures.VocabularySpecialisation):
  return {
    "kinds": result.kinds, "ids": result.ids_Q, "min_count": result.min_count,
    "share": result.share_QL, "top_share": result.top_share_QL,
    "chance": result.chance_QL, "top_chance": result.top_chance_QL,
  }  # fmt: skip


@columns.register
def _(result: measures.VocabularySpecialisation):
  return long_table(
    {"kind": result.kinds, "router": result.routers},
    {"share": result.share_QL, "top_share": result.top_share_QL,
     "chance": result.chance_QL, "top_chance": result.top_chance_QL,
     "ids": result.ids_Q[:, None]},
  )  # fmt: skip


@summary.register
def _(result: measures.Load):
  return {
    "steps": result.steps_M, "checkpoints": result.names_M,
    "largest": result.load_MLE.max(-1),
    "smallest": result.load_MLE.min(-1),
  }  # fmt: skip


@columns.register
def _(result: measures.Load):
  return long_table(
    {"checkpoint": result.names_M, "router": result.routers,
     "expert": range(result.load_MLE.shape[-1])},
    {"step": result.steps_M[:, None, None], "load": result.load_MLE},
  )  # fmt: skip


@summary.register
def _(result: measures.Entropy):
  return {
    "steps": result.steps_M, "checkpoints": result.names_M,
    "share": result.share_ML,
  }  # fmt: skip


@columns.register
def _(result: measures.Entropy):
  return long_table(
    {"checkpoint": result.names_M, "router": result.routers},
    {"step": result.steps_M[:, None], "share": result.share_ML},
  )


@summary.register
def _(result: Similarity):
  both = {"weights": result.weights_LEE, "outputs": result.outputs_LEE}
  return {"tokens": result.num_tokens} | {
    f"{name}_{what}": reduce(pairs(cosine_LEE), axis=1)
    for name, cosine_LEE in both.items()
    for what, reduce in (("mean", np.mean), ("largest", np.max))
  }


@columns.register
def _(result: Similarity):
  E = range(result.weights_LEE.shape[-1])
  return long_table(
    {"router": result.routers, "expert": E, "other": E},
    {"weights": result.weights_LEE, "outputs": result.outputs_LEE},
  )


def _plain(value: Any) -> Any:
  """Of types that JSON has."""
  if isinstance(value, Mapping):
    return {key: _plain(x) for key, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(x) for x in value]
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  if isinstance(value, float):
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
  return value
