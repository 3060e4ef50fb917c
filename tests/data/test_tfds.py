# SPDX-License-Identifier: Apache-2.0
"""TFDS on both ends: as a source, and reading token stores; no TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest

from moejax.config import DataConfig
from moejax.data import load_tokenizer, open_stores, prepare, sources
from moejax.errors import DataError
from tests.data.corpora import quiet

tfds = pytest.importorskip("tensorflow_datasets")
TEXTS = {f"doc {n}": f"text number {n}: " + "word " * n for n in range(40)}


class MoejaxTestDocs(tfds.core.GeneratorBasedBuilder):
  """A small dataset, built here in the format that needs no TensorFlow."""

  # In a package TFDS looks for itself with importlib_resources, which neither
  # it nor etils installs any more.
  __module__ = "moejax_test_docs"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = tfds.features.FeaturesDict(
      {"body": tfds.features.Text(), "n": np.int32}
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for n, (key, text) in enumerate(TEXTS.items()):
      yield key, {"body": text, "n": n}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  builder = MoejaxTestDocs(data_dir=folder, file_format="array_record")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(num_shards=3)
  )
  return folder


@pytest.fixture
def spec(data_dir):
  return f"tfds:{data_dir}/moejax_test_docs/1.0.0"


def read_texts(source):
  return [
    doc.text
    for number, file in enumerate(source.units())
    for doc in source.documents(sources.Slice(number, 0, file.count))
  ]


def test_a_prepared_dataset_is_a_source(spec):
  source = sources.open_source(spec, "body")
  assert sorted(read_texts(source)) == sorted(TEXTS.values())
  assert len(source.names) == 3
  assert len(source.digests({}, lambda count: None)) == 3
  some = sources.open_source(f"{spec}:train[:10]", "body")
  assert read_texts(some) == read_texts(source)[:10]


def test_by_name_under_tfds_data_dir(data_dir):
  """In its own process: TFDS reads the variable when it is imported."""
  code = (
    "from tests.data import test_tfds; from moejax.data import sources; "
    "s = sources.open_source('tfds:moejax_test_docs:train', 'body'); "
    "assert len(test_tfds.read_texts(s)) == 40"
  )
  subprocess.run(
    [sys.executable, "-c", code], check=True, timeout=100,
    env={"TFDS_DATA_DIR": str(data_dir), "PATH": "", "PYTHONPATH": "."},
  )  # fmt: skip


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda spec: "tfds:no_such_dataset_here", "cannot open or prepare"),
    (lambda spec: f"{spec}:nosplit", "nosplit"),
  ],
)
def test_unknown_datasets_and_splits_are_one_line(spec, change, message):
  with pytest.raises(DataError, match=message) as caught:
    sources.open_source(change(spec), "body")
  assert "\n" not in str(caught.value)


def test_an_unknown_field_names_those_there_are(spec):
  with pytest.raises(DataError, match=r"no field 'text'; .*body, n"):
    sources.open_source(spec, "text")


def test_a_store_of_a_dataset_reads_as_a_dataset(spec, tmp_path):
  config = DataConfig(
    sources=(spec,), text_key="body", store=str(tmp_path), seq_len=32,
    validation_fraction=0.2,
  )  # fmt: skip
  (folder,) = prepare(config, say=quiet)
  tokenizer = load_tokenizer("byte")
  (store,) = open_stores(config, tokenizer).stores
  builder = tfds.builder_from_directory(folder)
  assert sorted(builder.info.splits) == ["train", "validation"]
  for split in ("train", "validation"):
    examples = builder.as_data_source(split)
    assert len(examples) == store.rows(split) > 0
    for row in (0, len(examples) - 1):
      ours = store.read(split, row)
      assert np.array_equal(examples[row]["tokens"], ours.tokens)
      assert np.array_equal(examples[row]["segment_ids"], ours.segment_ids)
      assert examples[row]["tokens"].dtype == ours.tokens.dtype == np.uint16


def test_reading_a_store_needs_no_tensorflow(tmp_path):
  (tmp_path / "a.txt").write_text("some text " * 50)
  code = f"""
import sys
from moejax.config import DataConfig
from moejax.data import prepare
import tensorflow_datasets as tfds
config = DataConfig(sources=({str(tmp_path / "a.txt")!r},), seq_len=16,
                    store={str(tmp_path / "store")!r}, validation_fraction=0.0)
(folder,) = prepare(config)
examples = tfds.builder_from_directory(folder).as_data_source("train")
assert examples[0]["tokens"].shape == (17,)
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
