# SPDX-License-Identifier: Apache-2.0
"""Padded and packed batches, and bfloat16, against Hugging Face."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moejax.generate import left_pad
from moejax.models import Rows, build
from tests.convert import families as hf
from tests.convert.test_hf_parity import (
  EACH,
  reference,
  relative_error,
  to_tree,
)

PAD = 6


def logits_fn(config):
  model = build(config)

  @jax.jit
  def logits(variables, tokens, rows):
    hidden = model.apply(variables, tokens, rows).hidden_BTD
    return model.apply(variables, hidden, method="logits")

  return logits


@EACH
def test_padding_changes_no_token(family):
  """A shorter and a longer row, padded on the left as generation has them."""
  tokens, _ = hf.inputs()
  padded, rows = left_pad([tokens[0].tolist(), tokens[1, :-PAD].tolist()])
  variables = to_tree(family, hf.tensors(family))
  got = logits_fn(family.config)(variables, padded, rows)
  want = reference(family)["logits"]
  assert relative_error(got[0, -hf.T :], want[0]) < 3e-6
  assert relative_error(got[1, -hf.T + PAD :], want[1, :-PAD]) < 3e-6


@EACH
def test_two_documents_packed_in_a_row_are_two_rows(family):
  tokens, _ = hf.inputs()
  rest = 5  # padding at the end, as the token store has it
  packed = np.concatenate([tokens.reshape(1, -1), np.zeros((1, rest), int)], 1)
  segments = np.repeat([1, 2, 0], [hf.T, hf.T, rest])[None]
  positions = np.concatenate([np.arange(n) for n in (hf.T, hf.T, rest)])[None]
  variables = to_tree(family, hf.tensors(family))
  got = logits_fn(family.config)(
    variables, jnp.asarray(packed), Rows(segments, positions)
  )
  documents = got[0, : 2 * hf.T].reshape(hf.B, hf.T, -1)
  assert relative_error(documents, reference(family)["logits"]) < 3e-6


def bfloat16_weights(family):
  return {
    name: x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for name, x in hf.tensors(family).items()
  }


@EACH
@pytest.mark.hf
def test_bfloat16_is_as_close_as_theirs(family):
  """Both computed in bfloat16, from the same weights, against float32."""
  torch = pytest.importorskip("torch", reason="the [hf] extra is missing")
  pytest.importorskip("transformers", reason="the [hf] extra is missing")
  tokens, _ = hf.inputs()
  weights = bfloat16_weights(family)
  with torch.no_grad():
    exact, theirs = (
      hf.load(family, weights, dtype)(torch.tensor(tokens))
      .logits.float()
      .numpy()
      for dtype in (torch.float32, torch.bfloat16)
    )
  config = dataclasses.replace(family.config, dtype="bfloat16")
  positions = jnp.tile(jnp.arange(hf.T), (hf.B, 1))
  rows = Rows(jnp.ones((hf.B, hf.T), jnp.int32), positions)
  variables = to_tree(family, weights)
  ours = np.asarray(logits_fn(config)(variables, jnp.asarray(tokens), rows))
  # A near-tie of routing that rounding flips moves a whole token, so the
  # median token is compared, not the worst.
  mine, other = (
    np.median(np.linalg.norm(x - exact, axis=-1)) for x in (ours, theirs)
  )
  size = np.median(np.linalg.norm(exact, axis=-1))
  assert 0 < mine < 1.5 * other, (mine / size, other / size)


@EACH
@pytest.mark.hf
def test_their_padded_batch_is_ours(family):
  torch = pytest.importorskip("torch", reason="the [hf] extra is missing")
  pytest.importorskip("transformers", reason="the [hf] extra is missing")
  tokens, _ = hf.inputs()
  padded, rows = left_pad([tokens[0].tolist(), tokens[1, :-PAD].tolist()])
  mask = np.asarray(rows.segment_ids_BT)
  model = hf.load(family, hf.tensors(family), torch.float32)
  with torch.no_grad():
    theirs = model(
      torch.tensor(np.asarray(padded)).long(),
      attention_mask=torch.tensor(mask).long(),
      position_ids=torch.tensor(np.asarray(rows.positions_BT)).long(),
    ).logits.numpy()
  variables = to_tree(family, hf.tensors(family))
  ours = np.asarray(logits_fn(family.config)(variables, padded, rows))
  assert relative_error(ours[mask > 0], theirs[mask > 0]) < 3e-6
