# SPDX-License-Identifier: Apache-2.0
"""`moejax convert`: published checkpoints to runs and back, and the proof."""

import argparse

from moejax.convert.check import check
from moejax.convert.from_hf import from_hf
from moejax.convert.load import FAMILIES
from moejax.convert.to_hf import SHARD_BYTES, to_hf
from moejax.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
  """`moejax convert from-hf|to-hf|check SRC DST`."""
  args = _parse(argv)
  if args.action == "from-hf":
    from_hf(args.source, args.target, args.dtype, args.tokenizer)
    return 0
  if args.action == "to-hf":
    if args.shard_size <= 0:
      raise ConfigError(f"--shard-size={args.shard_size} must be positive")
    size = int(args.shard_size * 1e9)
    to_hf(args.source, args.target, args.family, args.dtype, args.step, size)
    return 0
  findings = check(args.source, args.target, args.step)
  words = {True: "same", False: "DIFFERENT", None: "unknown"}
  for finding in findings:
    print(f"{finding.what:<10} {words[finding.same]:<10} {finding.text}")
  return 0 if all(finding.same is not False for finding in findings) else 1


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    "moejax convert",
    description="Hugging Face checkpoints (config.json, safetensors, "
    "tokenizer.json) as runs that `generate`, `eval` and "
    "`train --config.train.init_from` take, and back. Both ways go on where "
    "they were stopped.",
    epilog=f"Families: {', '.join(FAMILIES)}.",
  )
  actions = parser.add_subparsers(dest="action", required=True)
  into = actions.add_parser("from-hf", help="a hub's folder as a run's")
  into.add_argument("source", help="folder with config.json and safetensors")
  into.add_argument("target", help="folder of the run to make")
  into.add_argument(
    "--tokenizer", help="byte or a tokenizer.json, instead of the source's"
  )
  out = actions.add_parser("to-hf", help="a run's checkpoint as a hub's folder")
  out.add_argument("source", help="folder of a run")
  out.add_argument("target", help="new folder")
  out.add_argument(
    "--family", choices=FAMILIES, help="default: the one that fits"
  )
  out.add_argument(
    "--shard-size", type=float, default=SHARD_BYTES / 1e9, metavar="GB",
    help="size of one file (default %(default)s)",
  )  # fmt: skip
  for sub in (into, out):
    sub.add_argument(
      "--dtype", choices=_DTYPES, help="of the weights (default: theirs)"
    )
  same = actions.add_parser(
    "check", help="compare config, tokenizer, tensors and logits"
  )
  same.add_argument("source", help="a hub's folder, or a run's")
  same.add_argument("target", help="the other one")
  for sub in (out, same):
    sub.add_argument("--step", type=int, help="checkpoint (default: newest)")
  return parser.parse_args(argv)
