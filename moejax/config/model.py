# SPDX-License-Identifier: Apache-2.0
"""Options of the architecture."""

import dataclasses
from typing import Self

from moejax.config.fields import (
  nearest_divisor,
  option,
  require,
  require_choice,
  require_positive,
  section,
)
from moejax.errors import ConfigError
from moejax.spec import Spec


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
      f"{nearest_divisor(self.num_heads, self.num_kv_heads)}",
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
