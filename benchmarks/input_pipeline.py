# SPDX-License-Identifier: Apache-2.0
"""Speed of the data stage: preparing stores, and reading batches from them.

  python benchmarks/input_pipeline.py [--megabytes 8] [--seconds 3]

Prepares the standard library with bytes and with a BPE of 8192 entries trained
on it, by one process and by two, and reads batches of two shapes. Readers are
timed turn about, in one run, beside their parts: records as they lie in the
ArrayRecord files, and the same rows through TFDS's own decoding. Rates are by
the clock, and by CPU time of all processes, which a busy machine changes less.
"""

import argparse
import dataclasses
import functools
import os
import statistics
import tempfile
import time

import numpy as np

from moejax.config import DataConfig
from moejax.data import (
  load_batches,
  load_tokenizer,
  open_stores,
  prepare,
  sources,
  train_tokenizer,
)

SHAPES = ((16, 256), (8, 2048))  # (B, T)
ROUNDS = 5


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--megabytes", type=float, default=8, help="of text")
  parser.add_argument("--seconds", type=float, default=3, help="a reader")
  parser.add_argument("--workers", type=int, default=2, help="reader processes")
  args = parser.parse_args()
  load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
  print(f"{os.cpu_count()} cores, load average {load}")
  with tempfile.TemporaryDirectory() as folder:
    text = write_text(os.path.join(folder, "text"), args.megabytes)
    bpe = os.path.join(folder, "bpe")
    texts = read_texts(text)
    size = sum(len(t.encode()) for t in texts)
    clock, cpu = timed(lambda: train_tokenizer(texts, 8192, bpe))
    show("train-tokenizer, 8192 entries", size / clock, size / cpu)
    for tokenizer in ("byte", bpe):
      time_prepare(folder, text, tokenizer, size)
    for B, T in SHAPES:
      config = DataConfig(
        sources=(text,), store=os.path.join(folder, "byte 1"), seq_len=T
      )
      prepare(config, say=lambda line: None)
      time_reading(config, B, args.seconds, args.workers)


def write_text(folder: str, megabytes: float) -> str:
  """Copies of the standard library, each a little different, of that size."""
  documents = read_texts("python-stdlib")
  size = 0
  for copy in range(1000):
    for number, text in enumerate(documents):
      if size >= megabytes * 1e6:
        return folder
      path = os.path.join(folder, str(copy), f"{number}.py")
      os.makedirs(os.path.dirname(path), exist_ok=True)
      with open(path, "w") as f:
        f.write(f"# copy {copy}\n{text}")
      size += len(text.encode())
  return folder


def read_texts(spec: str) -> list[str]:
  source = sources.open_source(spec, "text")
  return [
    doc.text
    for number, file in enumerate(source.units())
    for doc in source.documents(sources.Slice(number, 0, file.count))
  ]


def timed(work) -> tuple[float, float]:
  """(seconds by the clock, CPU seconds of this process and ended children)."""

  def cpu() -> float:
    return sum(os.times()[:4])

  start, cpu_start = time.perf_counter(), cpu()
  work()
  return time.perf_counter() - start, cpu() - cpu_start


def show(name: str, by_clock: float, by_cpu: float) -> None:
  print(
    f"{name}: {by_clock / 1e6:.2f} MB/s, {by_cpu / 1e6:.2f} MB a CPU second",
    flush=True,
  )


def time_prepare(folder: str, text: str, tokenizer: str, size: int) -> None:
  name = "byte" if tokenizer == "byte" else "bpe"
  for processes in (1, 2):
    for _, T in SHAPES:
      config = DataConfig(
        sources=(text,), tokenizer=tokenizer, seq_len=T,
        store=os.path.join(folder, f"{name} {processes}"),
      )  # fmt: skip
      work = functools.partial(
        prepare, config, processes=processes, say=lambda line: None
      )
      clock, cpu = timed(work)
      label = f"prepare, {name}, T={T}, {processes} processes"
      show(label, size / clock, size / cpu)


def time_reading(
  config: DataConfig, B: int, seconds: float, workers: int
) -> None:
  """Rows/s and tokens/s of each way to read, medians over turns."""
  import tensorflow_datasets as tfds
  from array_record.python import array_record_data_source

  T = config.seq_len
  stores = open_stores(config, load_tokenizer("byte"))
  (store,) = stores.stores
  records = array_record_data_source.ArrayRecordDataSource(
    [str(store.folder / shard["name"]) for shard in store.shards("train")]
  )
  decoded = tfds.builder_from_directory(store.folder).as_data_source("train")
  rng = np.random.default_rng(0)

  def random_rows(source):
    return lambda: [source[int(i)] for i in rng.integers(0, len(source), B)]

  # Little is read ahead, as what was read between turns would count too.
  config = dataclasses.replace(config, prefetch_rows=2 * B)
  parallel = dataclasses.replace(config, num_workers=workers)
  with (
    load_batches(stores, config, "train", B, 0) as threads,
    load_batches(stores, parallel, "train", B, 0) as processes,
  ):
    readers = {
      "records as they lie": random_rows(records),
      "TFDS data source": random_rows(decoded),
      "batches, threads": lambda: next(threads),
      f"batches, {workers} processes": lambda: next(processes),
    }
    rates = {name: [] for name in readers}
    for name in readers:
      readers[name]()  # start readers, fill caches
    for _ in range(ROUNDS):
      for name, read in readers.items():
        rates[name].append(B * calls_per_second(read, seconds / ROUNDS))
  for name, values in rates.items():
    rate = statistics.median(values)
    tokens = rate * T / 1e6
    print(f"B={B}, T={T}, {name}: {rate:,.0f} rows/s, {tokens:.2f} M tokens/s")


def calls_per_second(read, seconds: float) -> float:
  count, start = 0, time.perf_counter()
  while time.perf_counter() - start < seconds:
    read()
    count += 1
  return count / (time.perf_counter() - start)


if __name__ == "__main__":
  main()
