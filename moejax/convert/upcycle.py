# SPDX-License-Identifier: Apache-2.0
"""Sparse upcycling: a dense run's checkpoint as a mixture of experts.

Each expert begins as the dense MLP, routers as they are drawn, all else as it
was (Komatsuzaki et al. 2022, arXiv:2212.05055). With granularity G an expert is
one of G slices of the MLP's hidden channels, and slices that make up an MLP
share their router's column: the virtual groups of He et al. 2024
(arXiv:2410.07524).
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np

from moejax import runs
from moejax.checkpoint import CheckpointReader, LeafReader, StepWriter
from moejax.checkpoint.leaves import Leaf, describe, named_leaves
from moejax.checkpoint.manifest import NAME as MANIFEST
from moejax.config import Config, ModelConfig, config_after, differences
from moejax.convert.from_hf import (
  STEP,
  converted_meta,
  is_done,
  tokenizer_name,
)
from moejax.convert.hub_export import architecture
from moejax.convert.rules import layer_path
from moejax.convert.slices import SliceWeights
from moejax.convert.to_hf import leaf_of
from moejax.data.tokenizer import Tokenizer
from moejax.errors import ConfigError
from moejax.models import build, unstack_repeats
from moejax.progress import format_bytes, progress_bar
from moejax.runlock import LOCK_FILE, RunLock
from moejax.step import init_state

Array = np.ndarray
ROUTER = "w_router_DE"
# Of an expert, of the dense MLP, and the axis of the latter's hidden channels.
EXPERTS = {
  "w_gate_EDF": ("w_gate_DF", 1),
  "w_up_EDF": ("w_up_DF", 1),
  "w_down_EFD": ("w_down_FD", 0),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How experts are made of a dense MLP.

  Attributes:
    granularity: slices of the MLP; an expert is one of them.
    noise: share of the entries of each expert's matrices that are drawn anew
      (OLMoE, arXiv:2409.02060, tried 0.5).
    noise_std: of those entries, normal around 0.
  """

  granularity: int = 1
  noise: float = 0.0
  noise_std: float = 0.02

  def __post_init__(self):
    if self.granularity < 1:
      raise ConfigError(f"--granularity={self.granularity} must be positive")
    if not 0 <= self.noise <= 1:
      raise ConfigError(f"--noise={self.noise} is a share, not in [0, 1]")
    if not 0 < self.noise_std < float("inf"):
      raise ConfigError(f"--noise-std={self.noise_std} must be positive")

  @property
  def noise_text(self) -> str:
    """For people; empty without noise."""
    if not self.noise:
      return ""
    drawn = f"are drawn from N(0, {self.noise_std:g})"
    return f"{self.noise:.0%} of the experts' entries {drawn}"


def upcycle(
  source: str | os.PathLike,
  config: Config,
  target: str | os.PathLike,
  recipe: Recipe,
  step: int | None = None,
) -> None:
  """Makes a run's folder, with one float32 checkpoint, of a dense run's.

  One leaf passes through memory at a time, at most all experts' matrices of
  one kind in a layer. Stopped and called again, it goes on with the leaves that
  are missing. Layers lie apart, as in all converted runs, but what is drawn
  is drawn as `config.model.scan_layers` says.

  Args:
    source: folder of a run whose layers are all `/mlp`.
    config: of the model to make; some of its layers are `/moe`. Its seed is
      that of the routers and of the noise.
    target: the run's folder; new or empty.
    recipe: how experts are made.
    step: of the source's checkpoint; None takes the newest.

  Raises:
    UserError: a source that is not dense, a model that it does not fit, a
      target that holds something else, or a disk that is full.
  """
  source, target = Path(source), Path(target)
  trained = runs.read_config(source)
  checkpoints = CheckpointReader(runs.checkpoint_folder(source))
  found, meta, leaves = checkpoints.open_leaves(("params",), step)
  dense = config_after(trained, found).model  # RoPE's is that of its phase
  require_fit(source, dense, config.model, recipe.granularity)
  weights = SliceWeights.of(config.model, recipe.granularity)
  _require_free(target)
  words = runs.read_tokenizer(source, meta)
  manifest = runs.checkpoint_folder(source) / str(found) / MANIFEST
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data, tokenizer=tokenizer_name(target, words)
    ),
  )
  origin = dataclasses.asdict(recipe) | {
    "run": runs.origin_of(source),
    "step": found,
    "seed": config.seed,
  }
  digest = _digest(manifest.read_bytes(), config, origin)
  making = Upcycling(dense, config, recipe, weights, leaves)
  with RunLock(target):
    if is_done(target, digest):
      print(f"{target} holds this checkpoint already")
      return
    making.write(target, digest, words, {"upcycled_from": origin})
    runs.write_files(target, making.config, words)
  size = sum(leaf.num_bytes for leaf in making.table.values())
  print(
    f"{target}: {format_bytes(size)} of weights from {source}, step {found}"
  )
  print("\n".join(weights.report(recipe.noise_text)))


def require_fit(
  source: Path, dense: ModelConfig, model: ModelConfig, granularity: int
) -> None:
  """Checks that the model is the dense one but for its MoE layers.

  Raises:
    ConfigError: saying what is not so, both numbers, and what would fit.
  """
  for i, layer in enumerate(dense.layers):
    if layer.num_routers:
      raise ConfigError(
        f"{source} is not dense: layer {i} is {layer.mixer}/{layer.ffn}; "
        "upcycling begins with a model whose layers are all /mlp"
      )
  lines = differences(_shared(dense, model), _shared(model, model), "model.")
  if lines:
    raise ConfigError(
      f"--config is not the model of {source}: {'; '.join(lines)}; only the "
      "ffn of layers and model.moe may differ"
    )
  for i, (old, new) in enumerate(zip(dense.layers, model.layers, strict=True)):
    if old.mixer != new.mixer:
      raise ConfigError(
        f"--config's layer {i} is {new.mixer}/{new.ffn}, that of {source} "
        f"{old.mixer}/{old.ffn}; use {old.mixer}/{new.ffn}"
      )
  if all(layer.ffn == "mlp" for layer in model.layers):
    raise ConfigError(
      "--config has no MoE layer; set model.pattern=attention/moe"
    )
  _require_slices(dense.d_mlp, model, granularity)


def _shared(config: ModelConfig, model: ModelConfig) -> dict:
  """What both models have, without how it is computed."""
  values = dataclasses.asdict(architecture(config))
  for name in ("prefix", "pattern", "moe"):
    del values[name]
  if all(layer.ffn == "moe" for layer in model.layers):
    del values["d_mlp"]
  return values


def _require_slices(d_mlp: int, model: ModelConfig, G: int) -> None:
  """Checks that experts are whole slices of the MLP, and all of them there."""
  E, F, shared = (
    model.moe.num_experts, model.moe.d_expert, model.moe.num_shared_experts,
  )  # fmt: skip
  if F * G != d_mlp:
    fix = f"d_expert={d_mlp // G}"
    if d_mlp % G:
      fix = f"a granularity that divides {d_mlp}"
    raise ConfigError(
      f"model.moe.d_expert={F} times --granularity={G} is not the dense "
      f"model's d_mlp={d_mlp}; use {fix}"
    )
  if E % G:
    raise ConfigError(
      f"model.moe.num_experts={E} is not a multiple of --granularity={G}; use "
      f"{E - E % G + G}"
    )
  if shared:
    raise ConfigError(
      f"model.moe.num_shared_experts={shared}: the dense MLP goes to routed "
      "experts alone; use 0"
    )


def _require_free(target: Path) -> None:
  """A folder of this command has checkpoints; `is_done` looks into those."""
  if not target.is_dir() or runs.checkpoint_folder(target).is_dir():
    return
  inside = sorted({path.name for path in target.iterdir()} - {LOCK_FILE})
  if inside:
    raise ConfigError(
      f"--output={target} is not empty (it has {inside[0]}); use another folder"
    )


def _digest(manifest: bytes, config: Config, origin: dict) -> str:
  """What the result depends on; the manifest has digests of the weights."""
  digest = hashlib.sha256(manifest)
  options = [config.to_dict(), origin]
  digest.update(json.dumps(options, sort_keys=True).encode())
  return digest.hexdigest()


class Upcycling:
  """The leaves of the new model, one at a time."""

  def __init__(
    self,
    dense: ModelConfig,
    config: Config,
    recipe: Recipe,
    weights: SliceWeights,
    leaves: LeafReader,
  ):
    """Args:
    dense: the source's model, layers stacked or apart.
    config: of the run to make; drawn with its layers stacked or apart.
    recipe: how experts are made.
    weights: what the router gives each slice.
    leaves: the source's.
    """
    self._dense, self._drawn_as, self._leaves = dense, config, leaves
    self._recipe, self._weights = recipe, weights
    model = dataclasses.replace(config.model, scan_layers=False)
    self.config = dataclasses.replace(config, model=model)  # as it is written
    self.table: dict[str, Leaf] = describe(
      runs.abstract_variables(build(model))
    )
    self._layers = {
      layer_path(model, i): layer_path(dense, i)
      for i in range(model.num_layers)
    }

  def write(
    self, target: Path, digest: str, words: Tokenizer, more: dict
  ) -> None:
    """Writes the checkpoint; `more` is said in its JSON."""
    folder = runs.checkpoint_folder(target)
    if STEP in CheckpointReader(folder).steps():
      return
    writer = StepWriter(folder, STEP, self.table, digest)
    pending = list(writer.pending())
    drawn = self._drawn([n for n in pending if self._origin(n) is None])
    with progress_bar("upcycling tensors", len(pending)) as bar:
      for name in pending:
        # Without a name, so that it is gone when the next is made.
        writer.write(name, drawn[name] if name in drawn else self._made(name))
        bar.advance()
    writer.commit(converted_meta(self.config, words, digest) | more)

  def _origin(self, name: str) -> tuple[str, ...] | None:
    """Where in the dense model a leaf comes from; None: it is drawn."""
    path = tuple(name.split("/"))
    if path[0] != "params":
      return None
    for mine, theirs in self._layers.items():
      if path[: len(mine)] != mine:
        continue
      rest = path[len(mine) :]
      if rest[0] != "moe":
        return theirs + rest
      if rest[1] in EXPERTS:
        return (*theirs, "mlp", EXPERTS[rest[1]][0])
      return None
    return path

  def _made(self, name: str) -> Array:
    """A copy, or experts, in float32."""
    found = self._leaves.read(*leaf_of(self._origin(name), self._dense))
    found = found.astype(np.float32, copy=False)
    last = name.rpartition("/")[2]
    return self._experts(name, last, found) if last in EXPERTS else found

  def _experts(self, name: str, kind: str, dense: Array) -> Array:
    """Slice `e % G` for expert `e`; noise depends on the seed and the name."""
    recipe = self._recipe
    slices = np.split(dense, recipe.granularity, axis=EXPERTS[kind][1])
    factor = np.float32(self._weights.factor if kind == "w_down_EFD" else 1)
    rng = np.random.default_rng([self.config.seed, zlib.crc32(name.encode())])
    experts = np.empty(self.table[name].shape, np.float32)
    for e, expert in enumerate(experts):
      expert[:] = slices[e % recipe.granularity] * factor
      if recipe.noise:
        where = rng.random(expert.shape, np.float32) < recipe.noise
        fresh = rng.standard_normal(where.sum(), np.float32)
        expert[where] = recipe.noise_std * fresh
    return experts

  def _drawn(self, names: Collection[str]) -> dict[str, Array]:
    """What a fresh run of this config and seed begins with there.

    Stacked layers are drawn by other keys than the same layers apart.
    """
    config = self._drawn_as
    model = build(config.model)

    @jax.jit  # drops what is not asked for before it is computed
    def draw():
      variables = init_state(config, model).variables
      if config.model.scan_layers:
        variables = unstack_repeats(config.model, variables)
      leaves = named_leaves(variables)
      return {name: leaves[name] for name in names}

    drawn = jax.device_get(draw())
    return {name: self._grouped(name, leaf) for name, leaf in drawn.items()}

  def _grouped(self, name: str, leaf: Array) -> Array:
    """Neighbours that make up an MLP get the router's column of the first."""
    if name.rpartition("/")[2] != ROUTER:
      return leaf
    G = self._recipe.granularity
    return np.repeat(leaf[:, ::G], G, axis=1)
