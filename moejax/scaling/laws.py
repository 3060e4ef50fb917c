# SPDX-License-Identifier: Apache-2.0
"""The formulas of scaling laws, and those that were published.

N are parameters that a token uses, D tokens, C FLOPs, L nats per token. All
take numbers or arrays.

Hoffmann et al. 2022 (Chinchilla), arXiv:2203.15556; Besiroglu et al. 2024,
arXiv:2404.10102, who fitted Chinchilla's points again; Sun et al. 2024
(Hunyuan-Large), arXiv:2411.02265.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """y = coefficient * x^exponent."""

  coefficient: Any
  exponent: Any

  def __call__(self, x: Any) -> Any:
    return self.coefficient * x**self.exponent


@dataclasses.dataclass(frozen=True)
class ComputeLaw:
  """C = coefficient * N^exponent * D; 6 N D is `ComputeLaw(6, 1)`.

  Small models have an exponent below 1: attention and the output table cost
  FLOPs that parameters do not tell.
  """

  coefficient: Any
  exponent: Any

  def flops(self, params: Any, tokens: Any) -> Any:
    return self.coefficient * params**self.exponent * tokens

  def tokens(self, flops: Any, params: Any) -> Any:
    return flops / (self.coefficient * params**self.exponent)


SIX_ND = ComputeLaw(6.0, 1.0)


@dataclasses.dataclass(frozen=True)
class LossLaw:
  """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., equation 2)."""

  E: Any
  A: Any
  B: Any
  alpha: Any
  beta: Any

  def __call__(self, params: Any, tokens: Any) -> Any:
    return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

  def optimum(self, flops: Any, compute: ComputeLaw = SIX_ND) -> Any:
    """(N, D) of the lowest loss that `flops` can buy.

    On C = K N^p D the loss is E + A N^-alpha + B (K / C)^beta N^(p beta). Its
    derivative is zero where N^(alpha + p beta) = alpha A / (p beta B)
    (C / K)^beta: at p = 1, K = 6 that is equation 4 of Hoffmann et al.
    """
    K, p = compute.coefficient, compute.exponent
    log_ratio = np.log(self.alpha * self.A) - np.log(p * self.beta * self.B)
    log_params = (log_ratio + self.beta * np.log(flops / K)) / (
      self.alpha + p * self.beta
    )
    # Laws with next to no exponents put it beyond all numbers.
    params = np.exp(np.clip(log_params, -300, 300))
    return params, compute.tokens(flops, params)


@dataclasses.dataclass(frozen=True)
class Frontier:
  """N_opt and D_opt as power laws of C."""

  params: PowerLaw
  tokens: PowerLaw


# Section 2.3.1. N counts active parameters; C is C_min, the compute corrected
# for the batch size. The exponents add up to 1.03, so N D is not C / 9.59 for
# long: both laws are quoted as they were fitted.
HUNYUAN_LARGE = Frontier(PowerLaw(5.9e-3, 0.5305), PowerLaw(3.2, 0.50))

# Equation 10, as printed; and the second fit to the same points.
CHINCHILLA = LossLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
CHINCHILLA_REFITTED = LossLaw(
  E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658
)


def hunyuan_large_flops(params: Any, tokens: Any) -> Any:
  """C = 9.59 N D + 2.3e8 D, Hunyuan-Large's count of training FLOPs.

  N are active parameters. The constant stands for what does not grow with N,
  at the sequence length and in the shapes of their study (10M to 1B active
  parameters); below, it is most of the sum.
  """
  return (9.59 * params + 2.3e8) * tokens
