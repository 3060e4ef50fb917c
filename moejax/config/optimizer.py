# SPDX-License-Identifier: Apache-2.0
"""Options of the optimizer, the loss and of steps that are not taken."""

import dataclasses
import math

from moejax.config.fields import (
  option,
  require,
  require_choice,
  require_pattern,
  require_positive,
  section,
)
from moejax.errors import ConfigError
from moejax.spec import Spec


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
    ("w_embed", "w_output", "router"),
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
        require_pattern(f"optimizer.{name}", pattern)

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
      require_pattern("optimizer.rates", pattern)

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
