# SPDX-License-Identifier: Apache-2.0
"""Moving tokens: `dispatch(expert_fn, weights, x_TD, routing) -> y_TD`.

`expert_fn(h_AD, group_sizes_E, weights, scale_A) -> y_AD` computes on rows that
are sorted by expert, and multiplies each row of the result by its scale unless
that is None. All dispatches give the same result; they differ in what they
compute and move.
"""

from moejax.dispatch.dense import dense
from moejax.dispatch.padded import padded
from moejax.dispatch.ragged import ragged

DISPATCHES = {"dense": dense, "ragged": ragged, "padded": padded}

__all__ = ["DISPATCHES", "dense", "padded", "ragged"]
