# SPDX-License-Identifier: Apache-2.0
"""Every option of an experiment: its name, type, default, meaning and limits.

This is the one place where options live. `default_config()` turns the schema
into a locked `ConfigDict` that config files edit; `Config.from_dict` turns the
edited one back into frozen dataclasses, checking each value and all relations
once. Code below this boundary reads plain attributes and never a default.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from typing import Any, Self

import ml_collections

from moejax.errors import ConfigError
from moejax.spec import Spec

_LONGEST_ROW = 2**24  # a record of a token store is a message of protobuf
# Steps, rows and seeds are 32-bit integers on every device.
_LARGEST = 2**31 - 1


def option(default: Any, doc: str) -> Any:
  """A dataclass field with its documentation."""
  return dataclasses.field(default=default, metadata={"doc": doc})


def section(cls: type, doc: str) -> Any:
  return dataclasses.field(default_factory=cls, metadata={"doc": doc})


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    near = difflib.get_close_matches(value, choices, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
      f"{key}={value!r} is not one of {', '.join(choices)}{hint}"
    )


def _require_pattern(key: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as e:
    raise ConfigError(
      f"{key}: {pattern!r} is no regular expression: {e}"
    ) from None


def require_positive(prefix: str, obj: Any, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    require(value > 0, f"{prefix}.{name}={value} must be positive")


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """One layer of the stack, written `mixer/ffn` in a config.

  Mixers: `attention`; `shared_kv`, attention over the keys and values of the
  last layer that has its own (cross-layer attention); `moa`, a mixture of
  attention heads; `mla`, latent attention. Ffns: `moe`, `mlp`.
  """

  mixer: str
  ffn: str

  MIXERS = ("attention", "shared_kv", "moa", "mla")
  FFNS = ("moe", "mlp")

  @classmethod
  def parse(cls, text: str) -> Self:
    mixer, _, ffn = text.partition("/")
    require_choice("layer mixer", mixer, cls.MIXERS)
    require_choice("layer ffn", ffn, cls.FFNS)
    return cls(mixer, ffn)

  @property
  def has_kv(self) -> bool:
    """Whether the layer has keys and values of its own."""
    return self.mixer != "shared_kv"

  @property
  def num_routers(self) -> int:
    return (self.mixer == "moa") + (self.ffn == "moe")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """A mixture-of-experts layer: who decides, who moves, who computes."""

  num_experts: int = option(64, "routed experts E of each MoE layer")
  d_expert: int = option(1024, "hidden width F of one expert")
  router: str = option(
    "top_k(k=8)",
    "router and its arguments; a bare name lives in moejax.routing, a dotted "
    "path in any importable file",
  )
  dispatch: str = option(
    "ragged",
    "how tokens reach experts: ragged (exactly the rows there are), padded "
    "(buffers of the router's capacity) or dense (reference); the same results",
  )
  matmul: str = option(
    "auto", "grouped matmul back end; auto chooses by platform"
  )
  num_shared_experts: int = option(0, "experts that every token visits")
  output_bias: bool = option(
    False, "add one bias to each routed layer's output, after the sum"
  )

  def __post_init__(self):
    require_positive("model.moe", self, "num_experts", "d_expert")
    require(
      self.num_shared_experts >= 0, "model.moe.num_shared_experts is negative"
    )
    require_choice(
      "model.moe.dispatch", self.dispatch, ("ragged", "padded", "dense")
    )
    require_choice(
      "model.moe.matmul", self.matmul,
      ("auto", "reference", "cpu", "cpu_loops", "tpu", "gpu"),
    )  # fmt: skip
    k = self.experts_per_token
    require(
      0 < k <= self.num_experts,
      f"model.moe.router={self.router!r} asks for {k} experts per token, but "
      f"model.moe.num_experts={self.num_experts}; use 1 <= k <= "
      f"{self.num_experts}",
    )

  @property
  def router_spec(self) -> Spec:
    try:
      return Spec.parse(self.router)
    except ValueError as e:
      raise ConfigError(f"model.moe.router: {e}") from None

  @property
  def experts_per_token(self) -> int:
    """The router's `k`, 1 for routers without one."""
    kwargs = self.router_spec.kwargs
    k = kwargs["k"] if "k" in kwargs else 1
    require(
      type(k) is int, f"model.moe.router={self.router!r}: k must be an integer"
    )
    return k


# Name and options of each way to stretch RoPE.
ROPE_SCALINGS = {
  "none": (),
  "linear": ("factor",),
  "ntk": ("alpha",),
  "yarn": (
    "factor", "original", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Latent attention, of `mla` layers."""

  q_rank: int = option(1536, "width of the queries' latent; 0 is none")
  kv_rank: int = option(512, "width of the keys' and values' latent")
  nope_dim: int = option(128, "channels of a query that are not rotated")
  rope_dim: int = option(64, "channels that are; their key serves all heads")
  v_dim: int = option(128, "channels of a head's value")

  def __post_init__(self):
    require(self.q_rank >= 0, "model.mla.q_rank is negative")
    require_positive("model.mla", self, "kv_rank", "nope_dim", "v_dim")
    require(
      self.rope_dim > 0 and self.rope_dim % 2 == 0,
      f"model.mla.rope_dim={self.rope_dim} is not even; RoPE rotates pairs",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The transformer: `prefix` layers, then `pattern` repeated."""

  vocab_size: int = option(384, "rows of the embedding; >= the tokenizer's")
  d_model: int = option(2048, "residual width D")
  num_layers: int = option(16, "layers L, prefix included")
  prefix: tuple[str, ...] = option((), "layers before the pattern, unscanned")
  pattern: tuple[str, ...] = option(
    ("attention/moe",), "repeating layers, each mixer/ffn; ffn is moe or mlp"
  )
  num_heads: int = option(16, "query heads N")
  num_kv_heads: int = option(16, "key/value heads K; fewer than N is GQA")
  head_dim: int = option(128, "size H of one head")
  d_mlp: int = option(8192, "hidden width of dense `mlp` layers")
  moe: MoEConfig = section(MoEConfig, "mixture-of-experts layers")
  mla: MLAConfig = section(MLAConfig, "latent attention")
  qk_norm: str = option(
    "full",
    "norm of queries and keys: none, full (all heads at once), head, or "
    "head_after_rope",
  )
  clip_qkv: float = option(
    0.0, "queries, keys and values are clipped to +- this; 0 is no clip"
  )
  norm: str = option("rms", "rms (RMSNorm) or layer (LayerNorm without bias)")
  norm_position: str = option(
    "pre", "pre: on the input of mixer and ffn; post: on their output"
  )
  norm_eps: float = option(1e-5, "epsilon of the norms")
  final_norm_eps: float = option(
    0.0, "epsilon of the norm before the output table; 0 takes norm_eps"
  )
  rope_theta: float = option(10000.0, "RoPE base")
  rope_scaling: str = option(
    "none",
    "none, linear(factor=...), ntk(alpha=...), or yarn(factor=..., "
    "original=..., beta_fast=..., beta_slow=..., mscale=..., "
    "mscale_all_dim=...)",
  )
  tie_embeddings: bool = option(False, "output table = input table")
  init_std: float = option(0.02, "std of the normal init")
  init_cut: float = option(
    3.0, "weights are drawn again beyond so many init_std; 0 is no cut"
  )
  dtype: str = option("bfloat16", "compute dtype: bfloat16 or float32")
  attention: str = option(
    "auto", "attention back end: auto, plain, blockwise, cudnn or splash"
  )
  scan_layers: bool = option(
    True,
    "one compiled body for all repeats, parameters stacked; false compiles "
    "each layer apart, which saves copies on a CPU",
  )
  remat: str = option(
    "none",
    "what the backward pass computes again, from most to least: full, exchange "
    "(all but rows from other devices), experts (and what is no product), dots "
    "(what is no product) or none",
  )

  def __post_init__(self):
    require_positive(
      "model", self, "vocab_size", "d_model", "num_layers", "num_heads",
      "num_kv_heads", "head_dim", "d_mlp", "norm_eps", "rope_theta", "init_std",
    )  # fmt: skip
    require_choice(
      "model.qk_norm", self.qk_norm, ("none", "full", "head", "head_after_rope")
    )
    require_choice("model.norm", self.norm, ("rms", "layer"))
    require_choice("model.norm_position", self.norm_position, ("pre", "post"))
    require(self.clip_qkv >= 0, "model.clip_qkv is negative")
    require(self.init_cut >= 0, "model.init_cut is negative")
    require(self.final_norm_eps >= 0, "model.final_norm_eps is negative")
    require_choice("model.dtype", self.dtype, ("bfloat16", "float32"))
    require_choice(
      "model.attention", self.attention,
      ("auto", "plain", "blockwise", "cudnn", "splash"),
    )  # fmt: skip
    require_choice(
      "model.remat",
      self.remat,
      ("none", "full", "exchange", "experts", "dots"),
    )
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"model.num_heads={self.num_heads} is not divisible by "
      f"model.num_kv_heads={self.num_kv_heads}; use num_kv_heads="
      f"{_nearest_divisor(self.num_heads, self.num_kv_heads)}",
    )
    require(
      self.head_dim % 2 == 0,
      f"model.head_dim={self.head_dim} is odd; RoPE rotates pairs",
    )
    require(len(self.pattern) > 0, "model.pattern is empty; name one layer")
    rest = self.num_layers - len(self.prefix)
    whole = max(1, rest // len(self.pattern)) * len(self.pattern)
    require(
      rest >= 0 and rest % len(self.pattern) == 0,
      f"model.num_layers={self.num_layers} is not {len(self.prefix)} prefix "
      f"layers plus a multiple of the pattern's {len(self.pattern)}; use "
      f"{len(self.prefix) + whole}",
    )
    require(
      rest > 0 or not self.scan_layers,
      "model.prefix holds all layers: set model.scan_layers=false",
    )
    for stack in (self.prefix_layers, self.pattern_layers):
      self._check_stack(stack)
    assert self.rope_scaling_spec  # parses, and so checks it
    if self.uses_mla:
      require(
        all(layer.mixer == "mla" for layer in self.layers),
        "mla layers rotate fewer channels than others do: all layers must be "
        "mla, or none",
      )
      require(
        self.qk_norm == "none" and self.clip_qkv == 0,
        "mla layers have no QK-norm and no clip: model.qk_norm=none, "
        "model.clip_qkv=0",
      )

  def _check_stack(self, layers: tuple[LayerConfig, ...]) -> None:
    mixers = [layer.mixer for layer in layers]
    if "shared_kv" in mixers:
      require(
        mixers[0] != "shared_kv",
        "a shared_kv layer needs a layer with keys before it, within the "
        "prefix or within the pattern: ('attention/moe', 'shared_kv/moe')",
      )
      require(
        self.qk_norm in ("none", "head_after_rope"),
        f"model.qk_norm={self.qk_norm!r} norms keys before RoPE, so shared_kv "
        "layers cannot share them; use none or head_after_rope",
      )
    if "moa" in mixers:
      k = self.moe.experts_per_token
      require(
        self.num_heads == k * self.num_kv_heads,
        f"model.num_heads={self.num_heads} is not num_kv_heads="
        f"{self.num_kv_heads} times the {k} attention experts of a token; use "
        f"{k * self.num_kv_heads}",
      )
      require(
        self.qk_norm == "none", "moa layers have no QK-norm: model.qk_norm=none"
      )

  @property
  def rope_scaling_spec(self) -> Spec:
    """How RoPE's frequencies are stretched, checked."""
    try:
      spec = Spec.parse(self.rope_scaling)
    except ValueError as e:
      raise ConfigError(f"model.rope_scaling: {e}") from None
    require_choice("model.rope_scaling", spec.name, tuple(ROPE_SCALINGS))
    options = ROPE_SCALINGS[spec.name]
    require(
      set(spec.kwargs) == set(options)
      and all(isinstance(v, (int, float)) for v in spec.kwargs.values())
      and all(
        v > 0 or (v == 0 and name == "mscale_all_dim")
        for name, v in spec.kwargs.items()
      ),
      f"model.rope_scaling={self.rope_scaling!r}: {spec.name} takes "
      f"{', '.join(options) or 'no options'}, positive numbers",
    )
    return spec

  @property
  def uses_mla(self) -> bool:
    return any(layer.mixer == "mla" for layer in self.layers)

  @property
  def rope_dim(self) -> int:
    """Channels of a head that RoPE rotates."""
    return self.mla.rope_dim if self.uses_mla else self.head_dim

  @property
  def score_and_value_dims(self) -> tuple[int, int]:
    """Channels of a head's scores and of its values."""
    if self.uses_mla:
      return self.mla.nope_dim + self.mla.rope_dim, self.mla.v_dim
    return self.head_dim, self.head_dim

  def cache_shape(self, layer: LayerConfig) -> tuple[int, int, int]:
    """(heads, channels of keys, channels of values) that a token caches."""
    if layer.mixer == "mla":
      return 1, self.mla.kv_rank + self.mla.rope_dim, 0
    return self.num_kv_heads, self.head_dim, self.head_dim

  @property
  def prefix_layers(self) -> tuple[LayerConfig, ...]:
    return tuple(LayerConfig.parse(text) for text in self.prefix)

  @property
  def pattern_layers(self) -> tuple[LayerConfig, ...]:
    return tuple(LayerConfig.parse(text) for text in self.pattern)

  @property
  def num_repeats(self) -> int:
    return (self.num_layers - len(self.prefix)) // len(self.pattern)

  @property
  def layers(self) -> tuple[LayerConfig, ...]:
    """All layers in order."""
    return self.prefix_layers + self.pattern_layers * self.num_repeats


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where tokens come from."""

  sources: tuple[str, ...] = option(
    ("python-stdlib",),
    "python-stdlib, a TFDS name as tfds:NAME, or a file, folder or glob of "
    ".txt .txt.gz .md .py .jsonl .jsonl.gz .parquet",
  )
  weights: tuple[float, ...] = option(
    (), "share of each source in the rows; empty: in proportion to their size"
  )
  text_key: str = option("text", "field that holds the text in records")
  tokenizer: str = option("byte", "byte, or the path of a tokenizer.json")
  store: str = option("token_store", "folder of the prepared token stores")
  seq_len: int = option(1024, "row length T in tokens")
  order: int = option(
    0, "another number shuffles the rows anew and begins with all of them"
  )
  validation_fraction: float = option(
    0.01, "share of documents, chosen by hash, that are never trained on"
  )
  num_workers: int = option(0, "reader processes; 0 reads in threads")
  prefetch_rows: int = option(256, "rows read ahead per worker")

  def __post_init__(self):
    require(len(self.sources) > 0, "data.sources is empty; name one source")
    require(
      len(set(self.sources)) == len(self.sources),
      f"data.sources={self.sources} names a source twice; use data.weights",
    )
    if self.weights:
      require(
        len(self.weights) == len(self.sources),
        f"data.weights has {len(self.weights)} entries for "
        f"{len(self.sources)} data.sources; give one each",
      )
      require(
        all(w >= 0 for w in self.weights) and sum(self.weights) > 0,
        f"data.weights={self.weights} must be >= 0 and not all zero",
      )
    require_positive("data", self, "seq_len", "prefetch_rows")
    require(
      self.seq_len <= _LONGEST_ROW,
      f"data.seq_len={self.seq_len} is beyond {_LONGEST_ROW}",
    )
    require(self.num_workers >= 0, "data.num_workers is negative")
    require(self.order >= 0, "data.order is negative")
    require(
      0 <= self.validation_fraction < 1,
      f"data.validation_fraction={self.validation_fraction} is not in [0, 1)",
    )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Learning rate over steps, as a share of the peak."""

  name: str = option("wsd", "wsd (warm-up, stable, decay), cosine or linear")
  warmup: float = option(
    2000.0, "linear warm-up: steps if >= 1, a share of num_steps below 1"
  )
  decay: float = option(
    0.1, "last part of wsd: steps if >= 1, a share of num_steps below 1"
  )
  decay_shape: str = option(
    "1-sqrt", "shape of wsd's decay: exponential, linear, 1-sqrt or cosine"
  )
  final: float = option(0.1, "learning rate at the end, as a share of the peak")

  def __post_init__(self):
    require_choice(
      "optimizer.schedule.name", self.name, ("wsd", "cosine", "linear")
    )
    require_choice(
      "optimizer.schedule.decay_shape", self.decay_shape,
      ("exponential", "linear", "1-sqrt", "cosine"),
    )  # fmt: skip
    for name in ("warmup", "decay"):
      value = getattr(self, name)
      require(
        value >= 0 and (value < 1 or value == int(value)),
        f"optimizer.schedule.{name}={value} is neither whole steps nor a share "
        "below 1",
      )
    require(0 <= self.final <= 1, "optimizer.schedule.final is not in [0, 1]")
    require(
      self.final > 0 or self.decay_shape != "exponential" or self.name != "wsd",
      "optimizer.schedule.final=0 is out of reach of an exponential decay; use "
      "a small number such as 0.01, or another decay_shape",
    )

  def lengths(self, num_steps: int) -> tuple[int, int]:
    """(warm-up steps, decay steps) of a run of `num_steps`."""

    def steps(x: float) -> int:
      return int(x) if x >= 1 else round(x * num_steps)

    return steps(self.warmup), steps(self.decay) if self.name == "wsd" else 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon, with a global-norm clip."""

  name: str = option(
    "adamw", "adamw, or muon: Muon of matrices, Adam of the rest"
  )
  learning_rate: float = option(4e-4, "peak learning rate")
  schedule: ScheduleConfig = section(ScheduleConfig, "its shape over steps")
  b1: float = option(0.9, "decay of the first moment")
  b2: float = option(0.95, "decay of the second moment")
  eps: float = option(1e-8, "added to the root of the second moment")
  weight_decay: float = option(0.1, "decoupled decay, times the learning rate")
  no_decay: tuple[str, ...] = option(
    (), "regular expressions; parameters whose path matches are not decayed"
  )
  clip_norm: float = option(1.0, "largest global gradient norm; 0 is no clip")
  ema: float = option(
    0.0,
    "decay of a moving average of the weights, kept beside them: 0.999 "
    "forgets in about 1,000 steps; 0 is none",
  )
  mu_dtype: str = option(
    "float32", "of the first moment: float32 or bfloat16 (half its memory)"
  )
  rates: tuple[str, ...] = option(
    (),
    "PATTERN=FACTOR: learning rate of parameters whose path matches, over "
    "that of the rest; the first that matches holds",
  )
  expert_rate: str = option(
    "same",
    "learning rate of routed experts: same, fixed(factor=...), or "
    "batch_share(x=...) by the share of the batch that an expert sees, x the "
    "batch over its noise scale (Hunyuan-Large: 0.26)",
  )
  muon_adam: tuple[str, ...] = option(
    ("w_embed", "w_output", "w_router"),
    "regular expressions of matrices that Adam moves when name is muon",
  )

  def __post_init__(self):
    require_choice("optimizer.name", self.name, ("adamw", "muon"))
    require_choice("optimizer.mu_dtype", self.mu_dtype, ("float32", "bfloat16"))
    require_positive("optimizer", self, "learning_rate", "eps")
    assert self.expert_rate_spec  # parses, and so checks it
    self._check_rates()
    for name in ("b1", "b2"):
      value = getattr(self, name)
      require(0 <= value < 1, f"optimizer.{name}={value} is not in [0, 1)")
    require(self.weight_decay >= 0, "optimizer.weight_decay is negative")
    require(self.clip_norm >= 0, "optimizer.clip_norm is negative")
    require(0 <= self.ema < 1, f"optimizer.ema={self.ema} is not in [0, 1)")
    for name in ("no_decay", "muon_adam"):
      for pattern in getattr(self, name):
        _require_pattern(f"optimizer.{name}", pattern)

  def _check_rates(self) -> None:
    for rate in self.rates:
      pattern, equals, factor = rate.rpartition("=")
      try:
        good = bool(pattern and equals) and 0 <= float(factor) < math.inf
      except ValueError:
        good = False
      require(
        good, f"optimizer.rates: {rate!r} is not PATTERN=FACTOR, such as "
        "'w_router=0.5'",
      )  # fmt: skip
      _require_pattern("optimizer.rates", pattern)

  @property
  def expert_rate_spec(self) -> Spec:
    """`expert_rate`, parsed and checked."""
    try:
      spec = Spec.parse(self.expert_rate)
    except ValueError as e:
      raise ConfigError(f"optimizer.expert_rate: {e}") from None
    options = {"same": (), "fixed": ("factor",), "batch_share": ("x",)}
    require_choice("optimizer.expert_rate", spec.name, tuple(options))
    require(
      tuple(spec.kwargs) == options[spec.name]
      and all(
        isinstance(v, (int, float)) and v >= 0 for v in spec.kwargs.values()
      ),
      f"optimizer.expert_rate={self.expert_rate!r}: {spec.name} takes "
      f"{', '.join(options[spec.name]) or 'no options'}, not negative",
    )
    return spec


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Terms of the loss and the scope of their means."""

  z_loss: float = option(0.0, "weight of mean(logsumexp(logits)^2)")
  load_balance: float = option(0.01, "weight of the load-balancing loss")
  load_balance_scope: str = option(
    "global", "where loads are counted: the global batch, or each sequence"
  )
  sequence_balance: float = option(
    0.0, "weight of a second one, of each sequence (DeepSeek-V3, with a bias)"
  )
  mutual_information: float = option(
    0.0, "weight of minus the mutual information of tokens and experts"
  )
  router_entropy: float = option(
    0.0, "weight of the mean entropy of the router's probabilities"
  )
  router_z: float = option(0.001, "weight of the router z-loss")
  router_reduction: str = option(
    "mean", "router losses count as their mean over routers, or sum (JetMoE)"
  )
  chunk_size: int = option(
    1024, "tokens whose float32 logits exist at once; memory against speed"
  )

  def __post_init__(self):
    require_choice(
      "loss.load_balance_scope", self.load_balance_scope, ("global", "sequence")
    )
    require_choice(
      "loss.router_reduction", self.router_reduction, ("mean", "sum")
    )
    require_positive("loss", self, "chunk_size")
    for name in (
      "z_loss", "load_balance", "sequence_balance", "mutual_information",
      "router_entropy", "router_z",
    ):  # fmt: skip
      require(getattr(self, name) >= 0, f"loss.{name} is negative")


# What a phase may set: nothing of the state's shape.
PHASE_OPTIONS = (
  "optimizer.learning_rate", "optimizer.schedule.name",
  "optimizer.schedule.warmup", "optimizer.schedule.decay",
  "optimizer.schedule.decay_shape", "optimizer.schedule.final",
  "loss.z_loss", "loss.load_balance", "loss.sequence_balance",
  "loss.mutual_information", "loss.router_entropy", "loss.router_z",
  "model.rope_theta", "data.weights", "data.seq_len", "data.order",
  "train.batch_size", "train.accumulation_steps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
  """A stretch of the run in which some options are others.

  In a config file a dictionary: `{"name": "anneal", "tokens": 100e9, "options":
  {"optimizer.learning_rate": 4e-5}}`.

  Attributes:
    name: unique.
    steps, tokens: its length, one of them; of the last phase neither: it ends
      with the run.
    options: (dotted option, value); all others are the config's.
  """

  name: str
  steps: int = 0
  tokens: float = 0.0
  options: tuple[tuple[str, Any], ...] = ()

  @classmethod
  def from_value(cls, value: Any, path: str) -> Self:
    """Builds and checks one from the mapping that a config file writes."""
    if isinstance(value, cls):
      return value
    if not isinstance(value, (typing.Mapping, ml_collections.ConfigDict)):
      raise ConfigError(f"{path}={value!r} must be a dictionary with a name")
    fields = {"name": str, "steps": int, "tokens": float}
    kwargs: dict[str, Any] = {}
    for key in value:
      if key == "options":
        continue
      if key not in fields:
        raise ConfigError(
          f"{path}: no key {key!r}; a phase has name, steps or tokens, options"
        )
      kwargs[key] = _check_type(fields[key], value[key], f"{path}.{key}")
    if "name" not in kwargs or not kwargs["name"]:
      raise ConfigError(f"{path} has no name")
    options = dict(value["options"]) if "options" in value else {}
    where = f"phase {kwargs['name']}"
    for key in options:
      if key not in PHASE_OPTIONS:
        near = difflib.get_close_matches(key, PHASE_OPTIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
          f"{where} cannot set {key}{hint} Phases set "
          f"{', '.join(PHASE_OPTIONS)}"
        )
      kind = option_at(key).type
      options[key] = _check_type(kind, options[key], f"{where}: {key}")
    return cls(**kwargs, options=tuple(options.items()))

  def __post_init__(self):
    for name in ("steps", "tokens"):
      value = getattr(self, name)
      require(value >= 0, f"phase {self.name}: {name}={value} is negative")
    require(
      not (self.steps and self.tokens),
      f"phase {self.name} has steps and tokens; give one of them",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The length and size of the run."""

  num_steps: int = option(10_000, "optimizer steps")
  init_from: str = option(
    "", "folder of a run, trained or converted, whose weights this one takes"
  )
  branch_from: str = option(
    "",
    "RUN or RUN:step whose whole state this run begins with, steps and "
    "data included",
  )
  phases: tuple[PhaseConfig, ...] = option(
    (), "stretches of the run that set some options anew; see docs/phases.md"
  )
  batch_size: int = option(32, "rows of a global batch B")
  accumulation_steps: int = option(
    1, "microbatches a batch is computed in; changes memory, not the result"
  )

  def __post_init__(self):
    require_positive(
      "train", self, "num_steps", "batch_size", "accumulation_steps"
    )
    require(
      not (self.init_from and self.branch_from),
      "train.init_from takes weights, train.branch_from the whole state; give "
      "one of them",
    )
    require(
      self.batch_size % self.accumulation_steps == 0,
      f"train.batch_size={self.batch_size} is not divisible by "
      f"train.accumulation_steps={self.accumulation_steps}; use "
      f"{_nearest_divisor(self.batch_size, self.accumulation_steps)}",
    )


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """The mesh: how a run is split over devices, which changes no result.

  Their product is the number of devices.
  """

  data: int = option(1, "copies of the weights; each takes part of a batch")
  fsdp: int = option(
    1,
    "as `data`, but each keeps a part of weights and optimizer state and "
    "gathers the rest when it is used (ZeRO-3)",
  )
  expert: int = option(
    1, "as `fsdp`, but experts stay where they are and tokens go to them"
  )
  tensor: int = option(1, "parts of each head group, expert and dense layer")
  sequence: int = option(
    1, "parts of each row; attention sees whole rows of some heads"
  )
  exchange: str = option(
    "auto",
    "how tokens reach experts: all_to_all (rows go to where they are wanted), "
    "all_gather (all rows go everywhere; for small expert groups)",
  )
  receive_factor: float = option(
    0.0,
    "room for rows that a device's experts get, over the rows that it sends; "
    "0: for all that could come. Rows beyond it are dropped and counted in "
    "router/dropped",
  )
  overlap: str = option(
    "kernels",
    "what collectives run beside, as asked of a TPU's or GPU's compiler: "
    "kernels and all else; other (not kernels, with which libtpu 0.0.42 aborts "
    "on some steps); none (the compiler's defaults)",
  )

  AXES = ("data", "fsdp", "expert", "tensor", "sequence")
  EXCHANGES = ("auto", "all_to_all", "all_gather")
  OVERLAPS = ("kernels", "other", "none")

  def __post_init__(self):
    require_positive("parallel", self, *self.AXES)
    require_choice("parallel.exchange", self.exchange, self.EXCHANGES)
    require_choice("parallel.overlap", self.overlap, self.OVERLAPS)
    require(
      self.receive_factor == 0 or self.receive_factor >= 1,
      f"parallel.receive_factor={self.receive_factor} must be 0 or at least 1",
    )

  @property
  def num_devices(self) -> int:
    return math.prod(getattr(self, axis) for axis in self.AXES)

  @property
  def batch_parts(self) -> int:
    """Into how many parts the rows of a batch go."""
    return self.data * self.fsdp * self.expert


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When to save and what to keep."""

  every: int = option(1000, "steps between checkpoints")
  keep_last: int = option(2, "newest checkpoints to keep")
  keep_every: int = option(0, "keep each multiple of this for good; 0 is none")

  def __post_init__(self):
    require_positive("checkpoint", self, "every", "keep_last")
    require(self.keep_every >= 0, "checkpoint.keep_every is negative")
    require(
      self.keep_every % self.every == 0,
      f"checkpoint.keep_every={self.keep_every} is not a multiple of "
      f"checkpoint.every={self.every}",
    )


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
  """Steps that are not taken; non-finite ones never are."""

  max_skipped: int = option(10, "skipped steps in a row that end the run")
  spike: float = option(
    0.0,
    "skip steps whose loss or gradient norm is so many standard "
    "deviations above the mean of the last ones; 0 is off, OLMo-core has 6",
  )
  window: int = option(128, "how many last steps that mean is of")

  def __post_init__(self):
    require_positive("stability", self, "max_skipped")
    require(self.spike >= 0, "stability.spike is negative")
    require(self.window >= 4, f"stability.window={self.window} is below 4")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Validation during training."""

  every: int = option(500, "steps between evaluations; 0 is never")
  num_batches: int = option(16, "validation batches; fewer if they run out")
  batch_size: int = option(0, "rows per batch; 0 takes train.batch_size")
  ema: bool = option(False, "evaluate the averaged weights too")
  sample_prompt: str = option("", "text continued at each evaluation")
  sample_tokens: int = option(0, "tokens of that sample; 0 writes none")

  def __post_init__(self):
    for name in ("every", "batch_size", "sample_tokens"):
      require(getattr(self, name) >= 0, f"eval.{name} is negative")
    require_positive("eval", self, "num_batches")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment."""

  seed: int = option(0, "of parameters, data order and routing noise")
  model: ModelConfig = section(ModelConfig, "architecture")
  data: DataConfig = section(DataConfig, "data")
  optimizer: OptimizerConfig = section(OptimizerConfig, "optimizer")
  loss: LossConfig = section(LossConfig, "loss")
  train: TrainConfig = section(TrainConfig, "training")
  parallel: ParallelConfig = section(ParallelConfig, "split over devices")
  checkpoint: CheckpointConfig = section(CheckpointConfig, "checkpoints")
  eval: EvalConfig = section(EvalConfig, "evaluation")
  stability: StabilityConfig = section(StabilityConfig, "steps not taken")

  def __post_init__(self):
    require(self.seed >= 0, f"seed={self.seed} is negative")
    require(
      not self.eval.ema or self.optimizer.ema > 0,
      "eval.ema=True needs an average: set optimizer.ema, such as 0.999",
    )
    tokens = self.train.batch_size * self.data.seq_len
    require(
      tokens <= _LARGEST,
      f"train.batch_size * data.seq_len: {tokens} tokens are beyond {_LARGEST}",
    )
    self._check_parallel()
    self._check_phases()
    self._check_schedules()

  def _check_schedules(self) -> None:
    for start, steps, optimizer in schedule_stretches(self):
      warmup, decay = optimizer.schedule.lengths(steps)
      where = f"train.num_steps={steps}"
      if self.train.phases:
        where = f"the {steps} steps from step {start} on"
      require(
        warmup + decay <= steps,
        f"optimizer.schedule.warmup and .decay, {warmup} and {decay} steps, do "
        f"not fit in {where}; shorten them or use shares such as 0.1",
      )

  def _check_phases(self) -> None:
    """Lengths, and whether the rest fits what each phase sets."""
    *earlier, last = self.train.phases or (None,)
    if last is None:
      return
    names = [phase.name for phase in self.train.phases]
    require(len(set(names)) == len(names), f"train.phases: {names} repeats one")
    require(
      not (last.steps or last.tokens),
      f"phase {last.name} is the last and ends at train.num_steps; give it no "
      "steps or tokens",
    )
    for phase in earlier:
      require(
        bool(phase.steps or phase.tokens),
        f"phase {phase.name} has no length; give it steps or tokens",
      )
    for phase in self.train.phases:
      try:
        _with_phase(self, phase)
      except ConfigError as e:
        raise ConfigError(f"phase {phase.name}: {e}") from None

  def _check_parallel(self) -> None:
    """What is split must divide; each message names sizes that would."""
    split, model, train = self.parallel, self.model, self.train
    parts = split.batch_parts * train.accumulation_steps
    size = train.batch_size
    require(
      size % parts == 0,
      f"train.batch_size={size} does not divide into parallel.data * fsdp * "
      f"expert * train.accumulation_steps = {parts} parts; use "
      f"{_multiples(size, parts)}",
    )
    size, parts = self.eval.batch_size, split.batch_parts
    require(
      size % parts == 0,
      f"eval.batch_size={size} does not divide into parallel.data * fsdp * "
      f"expert = {parts} parts; use {_multiples(size, parts)}",
    )
    routed = any(layer.num_routers for layer in model.layers)
    attends = any(layer.mixer != "mla" for layer in model.layers)
    dense = any(layer.ffn == "mlp" for layer in model.layers)
    seq_len, moe = self.data.seq_len, model.moe
    for axis, key, number, there in (
      ("sequence", "data.seq_len", seq_len, True),
      ("tensor", "data.seq_len", seq_len // split.sequence, True),
      ("expert", "model.moe.num_experts", moe.num_experts, routed),
      ("tensor", "model.moe.d_expert", moe.d_expert, routed),
      ("tensor", "model.d_mlp", model.d_mlp, dense),
      ("tensor", "model.num_heads", model.num_heads, True),
      ("tensor", "model.num_kv_heads", model.num_kv_heads, attends),
    ):
      ways = getattr(split, axis)
      require(
        not there or number % ways == 0,
        f"{key}={number} does not divide by parallel.{axis}={ways}; use "
        f"parallel.{axis}={_nearest_divisor(number, ways)} or {key}="
        f"{_multiples(number, ways)}",
      )

  @classmethod
  def from_dict(cls, values: typing.Mapping[str, Any]) -> Self:
    """Builds and checks a config from a (possibly partial) nested mapping.

    Raises:
      ConfigError: an unknown key (naming the nearest), a wrong type, or values
        that do not fit together.
    """
    return _build(cls, values, "")

  def to_dict(self) -> dict[str, Any]:
    """Nested plain dictionary, the form stored as JSON with each run."""
    values = dataclasses.asdict(self)
    for phase in values["train"]["phases"]:
      phase["options"] = dict(phase["options"])
    return values


@dataclasses.dataclass(frozen=True)
class Phase:
  """A stretch of a run.

  Attributes:
    name: empty in a run without phases.
    start: steps before it.
    end: steps at its end.
    config: what holds in it; it has no phases.
    own_schedule: whether its learning rate is a schedule of its own.
  """

  name: str
  start: int
  end: int
  config: "Config"
  own_schedule: bool


def _with_phase(config: Config, phase: PhaseConfig) -> Config:
  """The config with what a phase sets."""
  by_section: dict[str, dict[str, Any]] = {"train": {"phases": ()}}
  schedule: dict[str, Any] = {}
  for path, value in phase.options:
    section_name, _, name = path.rpartition(".")
    if section_name == "optimizer.schedule":
      schedule[name] = value
    else:
      by_section.setdefault(section_name, {})[name] = value
  if schedule:
    by_section.setdefault("optimizer", {})["schedule"] = dataclasses.replace(
      config.optimizer.schedule, **schedule
    )
  changed = {
    name: dataclasses.replace(getattr(config, name), **values)
    for name, values in by_section.items()
  }
  try:
    return dataclasses.replace(config, **changed)
  except ConfigError:
    # Perhaps on another mesh: a run may go on with one.
    alone = {"parallel": ParallelConfig()}
    return dataclasses.replace(config, **(changed | alone))


def require_mesh_fits(config: Config) -> None:
  """Refuses a run that reaches a phase which its mesh does not divide.

  Raises:
    ConfigError: naming the phase, and where to stop before it.
  """
  for phase in phases_of(config):
    if phase.config.parallel == config.parallel:
      continue
    try:
      dataclasses.replace(phase.config, parallel=config.parallel)
    except ConfigError as e:
      raise ConfigError(
        f"phase {phase.name} does not fit on this mesh ({e}); stop before it "
        f"by train.num_steps={phase.start}, and go on with another "
        "--config.parallel"
      ) from None


@functools.lru_cache(maxsize=64)
def phases_of(config: Config) -> tuple[Phase, ...]:
  """The phases of a run, in order; one without a name where it has none.

  A phase that begins at or after `train.num_steps` is not there: the run ends
  before it.
  """
  last = config.train.num_steps
  if not config.train.phases:
    return (Phase("", 0, last, config, True),)
  found: list[Phase] = []
  for phase in config.train.phases:
    start = found[-1].end if found else 0
    made = _with_phase(config, phase)
    tokens = made.train.batch_size * made.data.seq_len
    steps = phase.steps or math.ceil(phase.tokens / tokens) or last - start
    own = any(path.startswith("optimizer.") for path, _ in phase.options)
    end = min(start + steps, last)
    if start < last:
      found.append(Phase(phase.name, start, end, made, own or not found))
  return tuple(found)


def phase_at(config: Config, step: int) -> Phase:
  """The phase of the step that comes after `step` steps; at the end, the last.

  So a checkpoint after the last step of a phase belongs to the next one.
  """
  phases = phases_of(config)
  return next((p for p in phases if step < p.end), phases[-1])


def config_after(config: Config, step: int) -> Config:
  """What held in the last of the first `step` steps; it has no phases."""
  return phase_at(config, max(step - 1, 0)).config


def schedule_stretches(
  config: Config,
) -> list[tuple[int, int, OptimizerConfig]]:
  """(first step, steps, options) of each schedule of the learning rate.

  A phase that sets options of the optimizer has a schedule of its own, over its
  own steps and those of the phases after it that set none.
  """
  starts = [p for p in phases_of(config) if p.own_schedule]
  ends = [p.start for p in starts[1:]] + [config.train.num_steps]
  return [
    (p.start, end - p.start, p.config.optimizer) for p, end in zip(starts, ends)
  ]


def default_config() -> ml_collections.ConfigDict:
  """All options at their defaults, as a locked ConfigDict to edit."""
  config = ml_collections.ConfigDict(_defaults(Config))
  return config.lock()


def _defaults(cls: type) -> dict[str, Any]:
  """Default values of a schema class without its cross-checks."""
  values = {}
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.type):
      values[field.name] = _defaults(field.type)
    else:
      values[field.name] = field.default
  return values


def set_option(config: ml_collections.ConfigDict, path: str, text: str) -> None:
  """Sets `path` (dotted) of a ConfigDict from command-line text.

  The schema gives the type, so `1e-3`, `true`, `3,4` and `none` mean what the
  option needs and nothing else.
  """
  set_value(config, path, _parse_text(option_at(path).type, text, path))


def set_value(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
  """Sets `path` (dotted) of a ConfigDict, if the value has the option's type.

  Raises:
    ConfigError: no such option, or another type.
  """
  value = _check_type(option_at(path).type, value, path)
  *parents, name = path.split(".")
  for parent in parents:
    config = config[parent]
  config[name] = value


def option_at(path: str) -> dataclasses.Field:
  """The option's field of the schema.

  Raises:
    ConfigError: there is none of this name, or it is a section.
  """
  cls: type = Config
  *parents, name = path.split(".")
  for depth, parent in enumerate(parents):
    cls = _field(cls, parent, ".".join(parents[:depth])).type
    if not dataclasses.is_dataclass(cls):
      raise ConfigError(f"{path}: {parent} is an option, not a section")
  field = _field(cls, name, ".".join(parents))
  if dataclasses.is_dataclass(field.type):
    raise ConfigError(f"{path} is a section; set {path}.<option>=<value>")
  return field


def describe_options(cls: type = Config, prefix: str = "") -> list[str]:
  """One line an option, `name=default  meaning`, for `--help`."""
  lines = []
  for field in dataclasses.fields(cls):
    path = prefix + field.name
    if dataclasses.is_dataclass(field.type):
      lines += describe_options(field.type, path + ".")
    else:
      lines.append(f"{path}={field.default!r}  {field.metadata['doc']}")
  return lines


def differences(
  old: typing.Mapping[str, Any], new: typing.Mapping[str, Any], prefix: str = ""
) -> list[str]:
  """`key: old -> new` for each leaf that differs between two config dicts."""
  lines = []
  for key in sorted({*old, *new}):
    path = prefix + key
    if key not in old or key not in new:
      lines.append(f"{path}: {'added' if key not in old else 'removed'}")
    elif isinstance(old[key], typing.Mapping):
      lines += differences(old[key], new[key], path + ".")
    elif _plain(old[key]) != _plain(new[key]):
      lines.append(f"{path}: {_plain(old[key])!r} -> {_plain(new[key])!r}")
  return lines


def _plain(value: Any) -> Any:
  """JSON has no tuples: compare both spellings alike."""
  return list(value) if isinstance(value, (tuple, list)) else value


def _field(cls: type, name: str, where: str) -> dataclasses.Field:
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if name in fields:
    return fields[name]
  dotted = f"{where}.{name}" if where else name
  everywhere = [line.split("=")[0] for line in describe_options()]
  near = difflib.get_close_matches(name, fields, 1) or [
    path for path in everywhere if path.split(".")[-1] == name
  ]
  if not near:
    raise ConfigError(
      f"no option {dotted!r}; {where or 'config'} has {', '.join(fields)}"
    )
  best = f"{where}.{near[0]}" if where and near[0] in fields else near[0]
  raise ConfigError(f"no option {dotted!r}; did you mean {best!r}?")


def _build(cls: type, values: Any, where: str) -> Any:
  if not isinstance(values, (typing.Mapping, ml_collections.ConfigDict)):
    raise ConfigError(f"{where or 'a config'} is a section, got {values!r}")
  kwargs = {}
  for name in values:
    field = _field(cls, name, where)
    path = f"{where}.{name}" if where else name
    if dataclasses.is_dataclass(field.type):
      kwargs[name] = _build(field.type, values[name], path)
    else:
      kwargs[name] = _check_type(field.type, values[name], path)
  return cls(**kwargs)


def _check_type(kind: Any, value: Any, path: str) -> Any:
  if isinstance(kind, types.GenericAlias):
    if not isinstance(value, (tuple, list)):
      raise ConfigError(f"{path}={value!r} must be a tuple, e.g. ({value!r},)")
    element = typing.get_args(kind)[0]
    if element is PhaseConfig:
      found = [PhaseConfig.from_value(v, f"{path}[{i}]")
               for i, v in enumerate(value)]  # fmt: skip
      return tuple(found)
    return tuple(_check_type(element, v, path) for v in value)
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise ConfigError(
      f"{path}={value!r} must be {kind.__name__}, not {type(value).__name__}"
    )
  if kind is float and not math.isfinite(value):
    raise ConfigError(f"{path}={value!r} must be a finite number")
  if kind is int and abs(value) > _LARGEST:
    raise ConfigError(f"{path}={value} is beyond {_LARGEST}")
  return value


def _parse_text(kind: Any, text: str, path: str) -> Any:
  if isinstance(kind, types.GenericAlias):
    element = typing.get_args(kind)[0]
    if element is PhaseConfig:
      return _parse_phases(text, path)
    parts = text.strip("()[] ").split(",")
    parts = [part.strip(" '\"") for part in parts]
    return tuple(_parse_text(element, p, path) for p in parts if p)
  if kind is bool:
    if text.lower() not in ("true", "false"):
      raise ConfigError(f"{path}={text!r} must be true or false")
    return text.lower() == "true"
  try:
    return kind(text)
  except ValueError:
    raise ConfigError(f"{path}={text!r} must be {kind.__name__}") from None


def _parse_phases(text: str, path: str) -> tuple[PhaseConfig, ...]:
  """A JSON list of dictionaries, as config.json has them."""
  try:
    values = json.loads(text)
  except ValueError as e:
    raise ConfigError(
      f"{path} must be a JSON list of phases, such as "
      f'[{{"name": "first", "steps": 100}}, {{"name": "rest"}}]: {e}'
    ) from None
  return _check_type(tuple[PhaseConfig, ...], values, path)


def _multiples(n: int, of: int) -> str:
  """The multiples around `n`."""
  below = n - n % of
  return f"{below} or {below + of}" if below else str(of)


def _nearest_divisor(n: int, wanted: int) -> int:
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  divisors = {*small, *(n // d for d in small)}
  return min(divisors, key=lambda d: (abs(d - wanted), d))
