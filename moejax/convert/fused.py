# SPDX-License-Identifier: Apache-2.0
"""Experts in one tensor: how transformers 5 holds them, and saves on request.

A layer's gate and up projections are `mlp.experts.gate_up_proj` [E, 2F, D], its
down projections `mlp.experts.down_proj` [E, D, F], whatever the family's own
names are.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from moejax.convert.rules import Rule, one

_MARK = ".experts.gate_up_proj"


def meet(rules: Iterable[Rule], names: Collection[str]) -> list[Rule]:
  """The rules for a checkpoint of these names, experts apart or in one."""
  if not any(name.endswith(_MARK) for name in names):
    return list(rules)
  return list(_fused(rules))


def _fused(rules: Iterable[Rule]) -> Iterator[Rule]:
  gates = {}
  for rule in rules:
    kind = rule.paths[0][-1]
    if ".experts.0." not in rule.names[0]:
      names = (name.replace("block_sparse_moe", "mlp") for name in rule.names)
      yield dataclasses.replace(rule, names=tuple(names))
      continue
    prefix = rule.names[0].rpartition(".0.")[0]
    prefix = prefix.replace("block_sparse_moe", "mlp")
    E, (columns, rows) = len(rule.names), rule.shapes[0]
    if kind == "w_gate_EDF":
      gates[prefix] = rule.paths[0]
    elif kind == "w_up_EDF":
      paths = (gates.pop(prefix), rule.paths[0])
      yield _gate_up(f"{prefix}.gate_up_proj", (E, 2 * columns, rows), paths)
    else:
      yield one(
        f"{prefix}.down_proj", (E, columns, rows), rule.paths[0], _swap, _swap
      )
  assert not gates


def _gate_up(name: str, shape: tuple[int, ...], paths) -> Rule:
  return Rule(
    (name,), (shape,), paths,
    lambda ws: [_swap(w) for w in np.split(ws[0], 2, axis=1)],
    lambda xs: [np.concatenate([_swap(x) for x in xs], axis=1)],
  )  # fmt: skip


def _swap(w: np.ndarray) -> np.ndarray:
  return w.swapaxes(1, 2)
