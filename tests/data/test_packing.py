# SPDX-License-Identifier: Apache-2.0
"""Packing: no token lost, none counted twice, rows full, memory bounded."""

import numpy as np
import pytest

from moejax.data.packing import Packer, Row, model_inputs, pack

PAD = 2**31 - 1


def numbered_documents(rng, count, longest):
  """Documents whose token ids count up over all of them: each id is unique."""
  lengths = rng.integers(2, longest, count)
  ends = np.cumsum(lengths)
  return [
    np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends)
  ]


def make_packer(seq_len, **kwargs):
  return Packer(seq_len, PAD, np.dtype("<u4"), **kwargs)


@pytest.mark.parametrize("seed", range(12))
def test_every_token_but_the_first_is_a_target_once(seed):
  rng = np.random.default_rng(seed)
  seq_len = int(rng.integers(1, 40))
  packer = make_packer(
    seq_len,
    window=int(rng.integers(1, 20)),
    max_waste=float(rng.choice([0.0, 0.02, 1.0])),
  )
  documents = numbered_documents(rng, int(rng.integers(1, 200)), 100)
  rows = list(pack(documents, packer))
  inputs = [model_inputs(row.tokens, row.segment_ids) for row in rows]

  expected = np.concatenate([doc[1:] for doc in documents])
  targets = np.concatenate([x["targets"][x["loss_mask"]] for x in inputs])
  assert np.array_equal(np.sort(targets), expected)
  # Ids are consecutive in a document, so this says that each target follows
  # its own predecessor.
  before = np.concatenate([x["tokens"][x["loss_mask"]] for x in inputs])
  assert np.array_equal(before, targets - 1)
  assert all(row.tokens.shape == (seq_len + 1,) for row in rows)


@pytest.mark.parametrize("seed", range(4))
def test_segments_and_positions(seed):
  rng = np.random.default_rng(seed)
  documents = numbered_documents(rng, 60, 50)
  for row in pack(documents, make_packer(16)):
    x = model_inputs(row.tokens, row.segment_ids)
    present = row.segment_ids[row.segment_ids > 0]
    # 1, 2, ... without holes, each in one stretch, then padding.
    assert np.array_equal(np.unique(present), np.arange(1, present.max() + 1))
    assert (np.diff(present.astype(int)) >= 0).all()
    assert (row.segment_ids[len(present) :] == 0).all()
    assert (row.tokens[len(present) :] == PAD).all()
    for segment in np.unique(x["segment_ids"][x["segment_ids"] > 0]):
      here = x["segment_ids"] == segment
      assert np.array_equal(x["positions"][here], np.arange(here.sum()))
      # A piece's last token has no target in its segment.
      ends_inside = (row.segment_ids[-1] != segment) | (present.size < 17)
      assert x["loss_mask"][here].sum() == here.sum() - ends_inside
    assert not x["loss_mask"][x["segment_ids"] == 0].any()


def test_a_long_document_is_cut_with_one_token_of_overlap():
  rows = list(pack([np.arange(10, dtype=np.uint32)], make_packer(4)))
  assert [row.tokens.tolist() for row in rows] == [
    [0, 1, 2, 3, 4],
    [4, 5, 6, 7, 8],
    [8, 9, PAD, PAD, PAD],
  ]
  assert [row.segment_ids.tolist() for row in rows] == [
    [1] * 5,
    [1] * 5,
    [1, 1, 0, 0, 0],
  ]


def test_a_document_that_ends_with_a_row_leaves_no_crumb():
  rows = list(pack([np.arange(9, dtype=np.uint32)], make_packer(4)))
  assert [row.tokens.tolist() for row in rows] == [
    [0, 1, 2, 3, 4],
    [4, 5, 6, 7, 8],
  ]


def test_masks_stop_at_borders_and_padding():
  row = Row(np.arange(7), np.array([1, 1, 1, 2, 2, 0, 0]))
  x = model_inputs(row.tokens, row.segment_ids)
  assert x["loss_mask"].tolist() == [True, True, False, True, False, False]
  assert x["positions"].tolist()[:5] == [0, 1, 2, 0, 1]
  assert x["targets"].tolist() == [1, 2, 3, 4, 5, 6]


def test_model_inputs_of_a_batch_are_those_of_its_rows():
  rng = np.random.default_rng(0)
  rows = list(pack(numbered_documents(rng, 40, 30), make_packer(16)))
  batch = model_inputs(
    np.stack([r.tokens for r in rows]), np.stack([r.segment_ids for r in rows])
  )
  for b, row in enumerate(rows):
    for key, value in model_inputs(row.tokens, row.segment_ids).items():
      assert np.array_equal(batch[key][b], value), key


@pytest.mark.parametrize("longest", [20, 150, 900])
def test_rows_are_full_whatever_the_lengths(longest):
  rng = np.random.default_rng(longest)
  rows = list(pack(numbered_documents(rng, 3000, longest), make_packer(256)))
  fill = np.mean([(row.segment_ids > 0).mean() for row in rows])
  assert fill >= 0.975


def test_documents_just_over_half_a_row_still_fill_rows():
  documents = [np.arange(140, dtype=np.uint32)] * 1000
  rows = list(pack(documents, make_packer(256)))
  assert np.mean([(row.segment_ids > 0).mean() for row in rows]) >= 0.975


def test_without_cutting_a_document_that_fits_stays_whole():
  rng = np.random.default_rng(1)
  documents = [np.arange(n, dtype=np.uint32) for n in rng.integers(2, 18, 500)]
  rows = list(pack(documents, make_packer(16, max_waste=1.0)))
  pieces = sum(int(row.segment_ids.max()) for row in rows)
  assert pieces == len(documents)


def test_memory_is_bounded_and_rows_come_early():
  rng = np.random.default_rng(2)
  packer = make_packer(64, window=8)
  finished = 0
  for doc in numbered_documents(rng, 2000, 60):
    finished += len(list(packer.add(doc)))
    assert len(packer._open) <= 8
    assert len(packer._pieces) <= 8
  assert finished >= 2000 * 30 // 65 - 8


def test_a_document_without_a_target_is_refused():
  with pytest.raises(ValueError, match="no target"):
    list(make_packer(4).add(np.zeros(1, np.uint32)))
