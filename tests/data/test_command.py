# SPDX-License-Identifier: Apache-2.0
"""`moejax data ...` as a person runs it."""

import subprocess
import sys

import pytest

from moejax.__main__ import main
from tests.data.corpora import write_corpus


@pytest.fixture
def corpus(tmp_path):
  write_corpus(tmp_path / "corpus", 200)
  return tmp_path


def run(*args):
  return main(["data", *map(str, args)])


def test_prepare_from_arguments(corpus, capsys):
  args = (
    "prepare", "--sources", corpus / "corpus", "--store", corpus / "store",
    "--seq_len", 32, "--validation_fraction", 0.1,
  )  # fmt: skip
  assert run(*args) == 0
  assert "200 documents" in capsys.readouterr().out
  assert run(*args) == 0
  assert "ready" in capsys.readouterr().out


def test_prepare_from_a_config(corpus, capsys):
  config = corpus / "experiment.py"
  config.write_text(
    "from moejax.config import default_config\n"
    "def get_config():\n"
    "  config = default_config()\n"
    f"  config.data.sources = ({str(corpus / 'corpus')!r},)\n"
    "  return config\n"
  )
  store = f"--config.data.store={corpus / 'store'}"
  code = run("prepare", f"--config={config}", store, "--config.data.seq_len=64")
  assert code == 0
  (folder,) = (corpus / "store").iterdir()
  assert "-T64-" in folder.name
  assert run("prepare", f"--config={config}", "--config.data.seqlen=64") == 2
  assert "did you mean 'data.seq_len'" in capsys.readouterr().err


def test_train_tokenizer_and_use_it(corpus, capsys):
  output = corpus / "bpe" / "tokenizer.json"
  args = ("--sources", corpus / "corpus", "--vocab_size", 280)
  assert run("train-tokenizer", *args, "--output", output) == 0
  assert "280 entries" in capsys.readouterr().out
  code = run(
    "prepare", "--sources", corpus / "corpus", "--store", corpus / "store",
    "--tokenizer", output, "--seq_len", 32,
  )  # fmt: skip
  assert code == 0
  (folder,) = (corpus / "store").iterdir()
  assert "-v280-T32-" in folder.name
  again = corpus / "again.json"
  assert run("train-tokenizer", *args, "--output", again) == 0
  assert again.read_bytes() == output.read_bytes()


def test_bad_text_for_a_tokenizer_is_one_line(tmp_path, capsys):
  (tmp_path / "data.jsonl").write_text('{"text": "good"}\nbad\n')
  output = tmp_path / "out" / "tokenizer.json"
  args = ("--sources", tmp_path / "data.jsonl", "--output", output)
  assert run("train-tokenizer", *args) == 2
  err = capsys.readouterr().err
  assert "the line at byte 17: not JSON" in err and len(err.splitlines()) == 1
  assert not output.parent.exists()


@pytest.mark.parametrize(
  "args, message",
  [
    (["prepare", "--sources", "nothing-here"], "'nothing-here' is not there"),
    (["prepare", "--sources", "a", "--tokenizer", "b.json"], "no tokenizer at"),
    (["prepare", "--config=missing.py"], "no config file"),
    (["prepare", "--sources", "a", "--seq_len", "0"], "seq_len=0"),
    (
      ["train-tokenizer", "--sources", "nothing-here", "--output", "x"],
      "'nothing-here' is not there",
    ),
  ],
)
def test_mistakes_are_one_line(args, message, capsys):
  assert run(*args) == 2
  err = capsys.readouterr().err
  assert message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
  "args", [[], ["prepare"], ["prepare", "--sources", "a", "--nonsense"]]
)
def test_wrong_usage_shows_the_usage(args, capsys):
  with pytest.raises(SystemExit) as caught:
    run(*args)
  assert caught.value.code == 2
  assert "usage: moejax data" in capsys.readouterr().err


def test_importing_the_package_is_light():
  code = (
    "import sys, moejax.data; heavy = {'jax', 'grain', 'tensorflow_datasets', "
    "'tokenizers', 'pyarrow', 'array_record', 'rich'} & set(sys.modules); "
    "assert not heavy, heavy"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
