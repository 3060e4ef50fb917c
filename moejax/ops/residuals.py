# SPDX-License-Identifier: Apache-2.0
"""Names of what a backward pass may keep instead of computing it again."""

from jax.ad_checkpoint import checkpoint_name

__all__ = ["ATTENTION", "EXCHANGED", "PRODUCTS", "checkpoint_name"]

# Of kernels, which JAX does not know as matrix products.
ATTENTION = "attention"
PRODUCTS = "products"
# Rows that came from other devices.
EXCHANGED = "exchanged"
