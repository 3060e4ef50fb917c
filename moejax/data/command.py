# SPDX-License-Identifier: Apache-2.0
"""`moejax data prepare` and `moejax data train-tokenizer`."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

from moejax import cli
from moejax.config import DataConfig, EvalSetConfig, phases_of
from moejax.data import sources
from moejax.data.builder import prepare
from moejax.data.store_set import held_out_data
from moejax.data.tokenizer import train_tokenizer
from moejax.progress import format_seconds, progress_bar

_SOURCES_HELP = (
  "python-stdlib, tfds:NAME, or files, folders, globs of .txt .txt.gz .md "
  ".py .jsonl .jsonl.gz .parquet"
)


def main(argv: list[str]) -> int:
  """Runs `moejax data ...`; returns the exit code."""
  parser = argparse.ArgumentParser(
    "moejax data", description="Makes token stores, the form that text is "
    "trained from, and tokenizers."
  )  # fmt: skip
  commands = parser.add_subparsers(dest="command", required=True)
  _add_prepare(commands)
  _add_train_tokenizer(commands)
  args, extra = parser.parse_known_args(argv)
  if args.command == "prepare":
    return _prepare(parser, args, extra)
  if extra:
    parser.error(f"unknown argument {extra[0]!r}")
  return _train_tokenizer(args)


def _add_prepare(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser(
    "prepare",
    help="tokenise and pack the sources of a config",
    description="Makes the token stores of a config's sources. What is ready "
    "stays; what was interrupted goes on.",
  )
  cli.add_config_arguments(parser, required=False)
  add = parser.add_argument
  add("--sources", nargs="+", metavar="SOURCE", help=_SOURCES_HELP)
  add("--store", help="folder of the token stores")
  add("--seq_len", "--seq-len", type=int, help="row length T in tokens")
  add("--tokenizer", help="byte, or the path of a tokenizer.json")
  add("--text_key", "--text-key", help="field that holds the text in records")
  add(
    "--validation_fraction", "--validation-fraction", type=float,
    help="share of documents that are never trained on",
  )  # fmt: skip
  add(
    "--processes", type=int, default=0,
    help="how many tokenise at a time (default: what the machine has)",
  )  # fmt: skip
  add(
    "--rebuild", action="store_true",
    help="make stores anew that are damaged or whose source files changed",
  )  # fmt: skip


def _add_train_tokenizer(commands: argparse._SubParsersAction) -> None:
  parser = commands.add_parser(
    "train-tokenizer",
    help="train a byte-level BPE on sources",
    description="Trains a byte-level BPE; equal text gives an equal file.",
  )
  add = parser.add_argument
  add(
    "--sources", nargs="+", required=True, metavar="SOURCE", help=_SOURCES_HELP
  )
  add("--text_key", "--text-key", default=DataConfig.text_key)
  add("--vocab_size", "--vocab-size", type=int, default=8192)
  add("--output", required=True, help="tokenizer.json, or a folder for it")


def _prepare(
  parser: argparse.ArgumentParser, args: argparse.Namespace, extra: list[str]
) -> int:
  lengths: tuple[int, ...] = ()
  held_out: tuple[EvalSetConfig, ...] = ()
  if args.config:
    whole = cli.parse_config(args.config, extra)
    config = whole.data
    lengths = tuple(p.config.data.seq_len for p in phases_of(whole))
    held_out = tuple(entry for entry in whole.eval.sets if entry.data)
  elif args.sources:
    if extra:
      parser.error(f"unknown argument {extra[0]!r}")
    config = DataConfig()
  else:
    parser.error("name --config=FILE or --sources")
  names = (
    "store", "seq_len", "tokenizer", "text_key", "validation_fraction"
  )  # fmt: skip
  changes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
  if args.sources:
    changes |= {"sources": tuple(args.sources), "weights": ()}
    held_out = ()
  config = dataclasses.replace(config, **changes)
  if args.processes < 0:
    parser.error("--processes is negative")
  if args.seq_len or not lengths:
    lengths = (config.seq_len,)
  try:
    for seq_len in dict.fromkeys(lengths):  # of all phases
      rows = dataclasses.replace(config, seq_len=seq_len)
      for data in (rows, *(held_out_data(rows, e) for e in held_out)):
        prepare(data, processes=args.processes, rebuild=args.rebuild)
  except KeyboardInterrupt:
    print("interrupted; the same command goes on", file=sys.stderr)
    return 130
  return 0


def _train_tokenizer(args: argparse.Namespace) -> int:
  start = time.monotonic()
  opened = [sources.open_source(spec, args.text_key) for spec in args.sources]
  total = sum(
    unit.count * unit.unit_bytes for source in opened for unit in source.units()
  )
  with progress_bar("reading text, MB", round(total / 1e6)) as bar:
    tokenizer = train_tokenizer(
      _texts(opened, bar.advance), args.vocab_size, args.output
    )
  if tokenizer.vocab_size < args.vocab_size:
    print(f"note: the text gives {tokenizer.vocab_size} entries, no more")
  print(
    f"{args.output}: {tokenizer.vocab_size} entries, "
    f"{format_seconds(time.monotonic() - start)}; use it with "
    f"--config.data.tokenizer={args.output}"
  )
  return 0


def _texts(opened: Sequence[sources.Source], advance) -> Iterator[str]:
  """All texts; tells whole megabytes."""
  rest = 0
  for source in opened:
    for number, file in enumerate(source.units()):
      piece = sources.Slice(number, 0, file.count)
      for doc in source.documents(piece):
        rest += len(doc.text)
        if rest >= 1 << 20:
          advance(rest >> 20)
          rest %= 1 << 20
        yield doc.text
