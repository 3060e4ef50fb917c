# SPDX-License-Identifier: Apache-2.0
"""Text from a model: prefill the KV cache, then one step a token.

From Python, prompts of any lengths at once:

  run = load_run("runs/tiny")
  texts = generate(run.model, run.variables, run.tokenizer, ["def ", "class "])
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ModelConfig
from moejax.data.tokenizer import Tokenizer
from moejax.errors import ConfigError
from moejax.memory import require_memory
from moejax.models import KVCache, Rows, Transformer, Variables, unstack_repeats
from moejax.progress import printable
from moejax.routing import is_causal, resolve
from moejax.runs import load_run
from moejax.sampling import Sampling, next_tokens

Array = jax.Array
OnTokens = Callable[[list[int | None]], None]
DEFAULT_SAMPLING = Sampling(temperature=0.8, top_p=0.95)
# Prompts and caches are padded to multiples of these, so that few shapes are
# compiled.
PROMPT_BUCKET = 32
CACHE_BUCKET = 128


def generate(
  model: Transformer,
  variables: Variables,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  max_new_tokens: int = 200,
  sampling: Sampling = DEFAULT_SAMPLING,
  seed: int = 0,
  on_tokens: OnTokens | None = None,
) -> list[str]:
  """The text that follows each prompt, up to the end-of-text token.

  Args:
    model, variables, tokenizer: as `load_run` returns them.
    prompts: texts of any lengths; an empty one starts a new document.
    max_new_tokens: most tokens per prompt.
    sampling: greedy, temperature, top-k, top-p.
    seed: of the draws; each row's depend on its place alone.
    on_tokens: called after each step with one token per row, None for rows
      that are done.
  """
  ids = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
  out = generate_tokens(
    model, variables, ids, max_new_tokens, sampling, jax.random.key(seed),
    stop_ids=(tokenizer.eos_id,), on_tokens=on_tokens,
  )  # fmt: skip
  return [tokenizer.decode_after(*pair) for pair in zip(ids, out, strict=True)]


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """The prompt as training saw documents begin."""
  # What a shell passes on of bytes that are not UTF-8.
  text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
  ids = [int(i) for i in tokenizer.encode(text)]
  if tokenizer.bos_id is not None:
    return [tokenizer.bos_id, *ids]
  return ids or [tokenizer.eos_id]


def generate_tokens(
  model: Transformer,
  variables: Variables,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampling: Sampling,
  key: Array,
  stop_ids: Sequence[int] = (),
  on_tokens: OnTokens | None = None,
) -> list[list[int]]:
  """New token ids after each prompt, stop tokens excluded.

  Raises:
    ConfigError: an empty prompt, an id beyond the vocabulary, or a router that
      looks at later tokens.
  """
  _check(model, prompts, max_new_tokens)
  model, variables = for_generation(model, variables)
  tokens_BT, rows = left_pad(prompts)
  B, T = tokens_BT.shape
  cache_len = -(-(T + max_new_tokens) // CACHE_BUCKET) * CACHE_BUCKET
  cache = functools.partial(KVCache.empty, model.config, B, cache_len)
  arrays = jax.tree.leaves(jax.eval_shape(cache))
  require_memory(
    sum(x.size * x.dtype.itemsize for x in arrays),
    f"a cache of {B} x {cache_len} tokens",
    "ask for fewer tokens or prompts",
  )
  cache = cache()
  keys_B = jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(B))
  token_B, cache = _prefill(
    model, sampling, variables, tokens_BT, rows, cache, keys_B
  )
  # Host arrays: additions of JAX's would be a program each, every step.
  positions_B = np.array([len(p) for p in prompts], np.int32)
  out: list[list[int]] = [[] for _ in prompts]
  alive = np.ones(B, bool)
  for step in range(max_new_tokens):
    new = np.asarray(token_B)
    alive &= ~np.isin(new, np.asarray(stop_ids, np.int32))
    for row in np.flatnonzero(alive):
      out[row].append(int(new[row]))
    if on_tokens:
      on_tokens(
        [int(t) if a else None for t, a in zip(new, alive, strict=True)]
      )
    if not alive.any() or step + 1 == max_new_tokens:
      break
    token_B, cache = _decode(
      model, sampling, variables, token_B, positions_B + step, alive,
      cache, keys_B, step,
    )  # fmt: skip
  return out


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Array, Rows]:
  """Prompts ending in the same column; padding in segment 0, before them."""
  T = -(-max(map(len, prompts)) // PROMPT_BUCKET) * PROMPT_BUCKET
  tokens_BT = np.zeros((len(prompts), T), np.int32)
  segments_BT, positions_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
  for b, prompt in enumerate(prompts):
    start = T - len(prompt)
    tokens_BT[b, start:] = prompt
    segments_BT[b, start:] = 1
    positions_BT[b, start:] = np.arange(len(prompt))
  return jnp.array(tokens_BT), Rows(
    jnp.array(segments_BT), jnp.array(positions_BT)
  )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(5,))
def _prefill(model, sampling, variables, tokens_BT, rows, cache, keys_B):
  """Fills the cache with the prompts and draws their next tokens."""
  output = model.apply(variables, tokens_BT, rows, cache)
  return _draw(model, sampling, variables, output, keys_B), output.cache


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(6,))
def _decode(
  model, sampling, variables, token_B, positions_B, alive_B, cache, keys_B, step
):
  """Appends one token a row and draws the next; done rows are padding."""
  rows = Rows(alive_B[:, None].astype(jnp.int32), positions_B[:, None])
  output = model.apply(variables, token_B[:, None], rows, cache)
  keys_B = jax.vmap(lambda key: jax.random.fold_in(key, step + 1))(keys_B)
  return _draw(model, sampling, variables, output, keys_B), output.cache


def _draw(model, sampling, variables, output, keys_B):
  hidden_B1D = output.hidden_BTD[:, -1:]
  logits_B1V = model.apply(variables, hidden_B1D, method="logits")
  return next_tokens(sampling, logits_B1V[:, 0], keys_B)


def for_generation(
  model: Transformer, variables: Variables
) -> tuple[Transformer, Variables]:
  """The same model, its weights laid out for one token at a time.

  Weights are cast to the compute dtype once (routers stay float32), and layers
  stand apart: a scan would copy each layer's weights out of the stack for each
  token. Both are done once; what comes back may be passed in again.
  """
  config = model.config
  if config.scan_layers:
    variables = _unstack(config, variables)
    config = dataclasses.replace(config, scan_layers=False)
    model = model.clone(config=config)

  def cast(path, x):
    return (
      x if "router" in jax.tree_util.keystr(path) else x.astype(config.dtype)
    )

  return model, jax.tree_util.tree_map_with_path(cast, variables)


_unstack = jax.jit(unstack_repeats, static_argnums=0)


def can_generate(config: ModelConfig) -> bool:
  """Whether no router looks at later tokens."""
  routed = any(layer.num_routers for layer in config.layers)
  return not routed or is_causal(resolve(config.moe.router_spec))


def require_generator(config: ModelConfig) -> None:
  """Refuses a model that cannot write, as a router looks at later tokens."""
  if not can_generate(config):
    raise ConfigError(
      f"router {config.moe.router!r} looks at later tokens and cannot generate"
    )


def _check(model, prompts, max_new_tokens) -> None:
  cfg = model.config
  require_generator(cfg)
  if not prompts or not all(len(p) for p in prompts):
    raise ConfigError("an empty prompt; give at least one token")
  if max_new_tokens < 1:
    raise ConfigError(f"max_new_tokens={max_new_tokens} must be positive")
  largest = max(max(p) for p in prompts)
  if largest >= cfg.vocab_size:
    raise ConfigError(
      f"token id {largest} is beyond model.vocab_size={cfg.vocab_size}; the "
      "tokenizer does not belong to this model"
    )


def main(argv: list[str]) -> int:
  """`moejax generate RUN --prompt TEXT`."""
  parser = argparse.ArgumentParser(
    "moejax generate", description="Let a run's checkpoint write text."
  )
  add = parser.add_argument
  add("workdir", help="folder of a run")
  add("--prompt", action="append", help="text to continue; may be repeated")
  add("--max-tokens", type=int, default=200, help="new tokens (default 200)")
  add(
    "--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)"
  )
  add("--top-k", type=int, default=0, help="keep the k likeliest (0: all)")
  add("--top-p", type=float, default=0.95, help="nucleus mass (default 0.95)")
  add("--seed", type=int, default=0, help="of the draws (default 0)")
  add("--step", type=int, help="checkpoint step (default: the newest)")
  add("--ema", action="store_true", help="the moving average of the weights")
  args = parser.parse_args(argv)
  sampling = Sampling(args.temperature, args.top_k, args.top_p)
  if not 0 <= args.seed < 2**31:
    raise ConfigError(f"--seed={args.seed} is not in [0, 2**31)")
  run = load_run(args.workdir, args.step, ema=args.ema)
  prompts = args.prompt or [""]
  require_generator(run.config.model)
  print(f"[{args.workdir}, step {run.step}]", file=sys.stderr)
  stream = _Stream(run.tokenizer, prompts) if len(prompts) == 1 else None
  texts = generate(
    run.model, run.variables, run.tokenizer, prompts, args.max_tokens, sampling,
    args.seed, on_tokens=stream,
  )  # fmt: skip
  if stream:
    stream.close()
    return 0
  for prompt, text in zip(prompts, texts, strict=True):
    print(printable(f"--- {prompt!r}\n{prompt}{text}", sys.stdout))
  return 0


class _Stream:
  """Prints one row's text as it comes, whole characters at a time."""

  def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str]):
    before = prompt_tokens(tokenizer, prompts[0])
    self._decoder = tokenizer.stream_decoder(before)
    self._write(prompts[0])

  def __call__(self, tokens: list[int | None]) -> None:
    if tokens[0] is not None:
      self._write(self._decoder.push(tokens[0]))

  def close(self) -> None:
    self._write(self._decoder.finish() + "\n")

  def _write(self, text: str) -> None:
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()
