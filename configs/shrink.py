# SPDX-License-Identifier: Apache-2.0
"""What `:tiny` of every published system shares: data and length, not shape.

The standard library of the running Python as bytes, 120 steps of 8 rows of 256:
about a minute on two CPU cores.
"""


def shrink_training(config):
  """Makes a run of minutes out of a run of months; the model stays."""
  config.model.vocab_size = 331  # 256 bytes, 3 special tokens, padding
  config.model.dtype = "float32"  # CPUs emulate bfloat16
  config.model.init_std = 0.02
  config.model.remat = "none"
  config.model.scan_layers = False
  config.data.sources = ("python-stdlib",)
  config.data.weights = ()
  config.data.tokenizer = "byte"
  config.data.seq_len = 256
  config.train.num_steps = 120
  config.train.batch_size = 8
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule.warmup = 20.0
  config.optimizer.schedule.decay = 0.2
  config.checkpoint.every = 60
  config.eval.every = 60
