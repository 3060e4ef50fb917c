# SPDX-License-Identifier: Apache-2.0
"""How tensors of a Hugging Face checkpoint become leaves of ours, and back.

A family is a list of rules. Each names the hub's tensors with their shapes, our
leaves (paths in the variables of `scan_layers=False`), and the two directions.
Both are permutations and cuts, never arithmetic, so a round trip is exact.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moejax.config import ModelConfig

Array = np.ndarray
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  """Hub tensors that together make some of our leaves.

  Attributes:
    names: of the hub's tensors.
    shapes: theirs, as stored.
    paths: of our leaves.
    load: hub tensors -> leaves.
    save: leaves -> hub tensors.
  """

  names: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]
  paths: tuple[Path, ...]
  load: Callable[[Sequence[Array]], Sequence[Array]]
  save: Callable[[Sequence[Array]], Sequence[Array]]


def one(
  name: str, shape: tuple[int, ...], path: Path, load: Callable, save: Callable
) -> Rule:
  """One tensor is one leaf."""
  return Rule(
    (name,), (shape,), (path,), lambda xs: [load(xs[0])],
    lambda xs: [save(xs[0])],
  )  # fmt: skip


def same(name: str, shape: tuple[int, ...], path: Path) -> Rule:
  """Kept as it is: tables, gains, biases."""
  return one(name, shape, path, lambda x: x, lambda x: x)


def linear(name: str, path: Path, leaf: tuple[int, ...], inputs: int) -> Rule:
  """A torch linear layer `[out, in]` as our `leaf`, inputs first.

  The first `inputs` axes of the leaf are the layer's input, flattened.
  """
  rows = int(np.prod(leaf[:inputs]))
  shape = (int(np.prod(leaf[inputs:])), rows)
  return one(
    name, shape, path, lambda w: w.T.reshape(leaf),
    lambda x: x.reshape(rows, -1).T,
  )  # fmt: skip


def experts(names: Sequence[str], path: Path, leaf: tuple[int, ...]) -> Rule:
  """One linear layer `[out, in]` an expert, stacked as `[E, in, out]`."""
  _, rows, columns = leaf
  return Rule(
    tuple(names), ((columns, rows),) * len(names), (path,),
    lambda ws: [np.stack([w.T for w in ws])],
    lambda xs: [w.T for w in xs[0]],
  )  # fmt: skip


def gated_experts(
  prefix: str, gate: str, up: str, down: str, config: ModelConfig, path: Path
) -> Iterable[Rule]:
  """The three stacks of a layer's experts from `prefix.e.gate.weight` etc."""
  E, D, F = config.moe.num_experts, config.d_model, config.moe.d_expert
  for ours, theirs, leaf in (
    ("w_gate_EDF", gate, (E, D, F)),
    ("w_up_EDF", up, (E, D, F)),
    ("w_down_EFD", down, (E, F, D)),
  ):
    names = [f"{prefix}.{e}.{theirs}.weight" for e in range(E)]
    yield experts(names, (*path, ours), leaf)


def mlp(prefix: str, d_hidden: int, config: ModelConfig, path: Path):
  """A dense SwiGLU of `prefix.{gate,up,down}_proj`."""
  D, F = config.d_model, d_hidden
  yield linear(f"{prefix}.gate_proj.weight", (*path, "w_gate_DF"), (D, F), 1)
  yield linear(f"{prefix}.up_proj.weight", (*path, "w_up_DF"), (D, F), 1)
  yield linear(f"{prefix}.down_proj.weight", (*path, "w_down_FD"), (F, D), 1)


def attention(
  prefix: str, config: ModelConfig, path: Path, has_kv: bool = True,
  norms: tuple[str, str] = ("q_norm", "k_norm"),
):  # fmt: skip
  """Separate q, k, v and o projections, and the QK-norm's gains."""
  D, N, K, H = (
    config.d_model, config.num_heads, config.num_kv_heads, config.head_dim,
  )  # fmt: skip
  yield linear(f"{prefix}.q_proj.weight", (*path, "w_q_DNH"), (D, N, H), 1)
  if has_kv:
    yield linear(f"{prefix}.k_proj.weight", (*path, "w_k_DKH"), (D, K, H), 1)
    yield linear(f"{prefix}.v_proj.weight", (*path, "w_v_DKH"), (D, K, H), 1)
  yield linear(f"{prefix}.o_proj.weight", (*path, "w_o_NHD"), (N, H, D), 2)
  if config.qk_norm == "none":
    return
  sizes = (N * H, K * H) if config.qk_norm == "full" else (H, H)
  for ours, theirs, size in zip(("q_norm", "k_norm"), norms, sizes):
    yield same(f"{prefix}.{theirs}.weight", (size,), (*path, ours))


def tables(
  embed: str, norm: str, head: str, config: ModelConfig
) -> Iterable[Rule]:
  """Input table, last norm, and the output table if it is not the first."""
  V, D = config.vocab_size, config.d_model
  yield same(embed, (V, D), ("params", "w_embed_VD"))
  yield same(norm, (D,), ("params", "final_norm", "scale"))
  if not config.tie_embeddings:
    yield same(head, (V, D), ("params", "w_output_VD"))


def layer_path(config: ModelConfig, layer: int) -> Path:
  """Where layer `layer` of the stack lies in the variables, layers apart."""
  prefix = len(config.prefix)
  if layer < prefix:
    return "params", f"prefix_{layer}"
  repeat, block = divmod(layer - prefix, len(config.pattern))
  return "params", f"repeats_{repeat}", f"block_{block}"
