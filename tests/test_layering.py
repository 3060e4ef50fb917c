# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: imports go one way, and the other rules of DESIGN.

Each rule is a function of a module's name and source that lists what is wrong;
each is also shown something wrong, so that it cannot pass by looking nowhere.
"""

import ast
import pathlib
import re

import pytest

from moejax.shapes import LEGEND

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("moejax", "configs", "tests", "benchmarks", "experiments")

# From the bottom up: a module imports its own layer and those before it.
LAYERS = {
  "foundation": "config spec shapes errors files storage",
  "mechanisms": "ops routing dispatch experts",
  "parts": (
    "models data parallel checkpoint runlock objectlock run_files optimizer "
    "losses metrics event_file progress sampling hardware phases stability "
    "profiling goodput"
  ),
  "commands": (
    "__main__ cli train loop init_from resume step memory runs evaluate "
    "held_out generate describe report data.command finetune analysis plan "
    "convert sweep scaling replay"
  ),
}
RANK = {
  f"moejax.{name}": rank
  for rank, names in enumerate(LAYERS.values())
  for name in names.split()
} | {"moejax": 0}

# Beyond the layers. `models` gets a dispatch passed in; the three swap points
# (who decides, who moves, who computes) share one type.
SWAP_POINTS = ("moejax.routing", "moejax.dispatch", "moejax.experts")
SHARED_TYPE = "moejax.routing.base"
PARTS = tuple(f"moejax.{name}" for name in LAYERS["parts"].split())

COLLECTIVES = frozenset(
  "psum pmean pmax pmin psum_scatter all_gather all_to_all ppermute pshuffle "
  "ragged_all_to_all shard_map pcast pvary axis_index".split()
)
MAX_FILE, MAX_FUNCTION = 400, 60
LONG_FUNCTIONS = {"moejax.train.train"}  # the loop and its order


def within(module, package):
  return module == package or module.startswith(package + ".")


def imports(source):
  """Dotted names of all that is imported, also inside functions."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rank_of(module):
  """Position of the module's layer; None if it has none."""
  while module not in RANK:
    module, dot, _ = module.rpartition(".")
    if not dot or module == "moejax":
      return None
  return RANK[module]


def wrong_direction(module, source):
  if not within(module, "moejax"):
    return []
  if (rank := rank_of(module)) is None:
    return [f"{module} has no layer; name one in tests/test_layering.py"]
  problems = []
  for name in imports(source):
    if within(name, "configs") or within(name, "tests"):
      problems.append(f"{module} imports {name}")
    if not within(name, "moejax") or name == "moejax":
      continue
    other = rank_of(name)
    if other is None or other > rank:
      problems.append(f"{module} imports {name}, of a layer above its own")
  return problems


def crossed_swap_points(module, source):
  problems = []
  for name in imports(source):
    own = next((p for p in SWAP_POINTS if within(module, p)), None)
    target = next((p for p in SWAP_POINTS if within(name, p)), None)
    if target and target != own and not within(name, SHARED_TYPE):
      if own or within(module, "moejax.ops"):
        problems.append(
          f"{module} imports {name}; only {SHARED_TYPE} is shared"
        )
    if within(module, "moejax.models") and not within(name, "moejax.models"):
      if any(within(name, part) for part in PARTS):
        problems.append(f"{module} imports {name}; models stand alone")
  return problems


def collectives(module, source):
  if not within(module, "moejax") or within(module, "moejax.parallel"):
    return []
  used = {
    node.attr
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Attribute)
    and re.match(r"(jax|lax)\b", ast.unparse(node.value))
  }
  used |= {
    name.rpartition(".")[2] for name in imports(source) if within(name, "jax")
  }
  return [
    f"{module} uses {name}; collectives live in moejax/parallel"
    for name in sorted(used & COLLECTIVES)
  ]


def hidden_options(module, source):
  if not (within(module, "moejax") or within(module, "configs")):
    return []
  problems = []
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    arguments = len(node.args) + len(node.keywords)
    if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
      owner, hidden = node.func.value, arguments == 2
    elif isinstance(node.func, ast.Name) and node.func.id == "getattr":
      owner, hidden = node.args[0], arguments == 3
    else:
      continue
    if hidden and re.search(r"config|\bcfg|\bc$|options", ast.unparse(owner)):
      problems.append(
        f"{module}:{node.lineno} hides an option: give moejax/config"
      )
  return problems


def sizes(module, source):
  problems = []
  lines = len(source.splitlines())
  if lines > MAX_FILE:
    problems.append(f"{module} has {lines} lines, over {MAX_FILE}")
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    length = node.end_lineno - node.lineno + 1
    name = f"{module}.{node.name}"
    if length > MAX_FUNCTION and name not in LONG_FUNCTIONS:
      problems.append(f"{name} has {length} lines, over {MAX_FUNCTION}")
  return problems


def names(module, source):
  problems = []
  if module.rpartition(".")[2] in ("utils", "util"):
    problems.append(f"{module}: a name for what it does is missing")
  if source and not source.startswith(
    "# SPDX-License-Identifier: Apache-2.0\n"
  ):
    problems.append(f"{module} does not start with its licence line")
  return problems


def suffixes(module, source):
  """Letters that end array names are the legend's, or the docstring's own."""
  if not within(module, "moejax"):
    return []
  tree = ast.parse(source)
  own = set(re.findall(r"`([A-Z])`", ast.get_docstring(tree) or ""))
  known = set(LEGEND) | set("0123456789") | own
  found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
  found |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
  problems = []
  for name in sorted(found):
    match = re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)", name)
    if match and not set(match[1]) <= known:
      problems.append(f"{module}: {name} ends in letters of no legend")
  return problems


RULES = (
  wrong_direction,
  crossed_swap_points,
  collectives,
  hidden_options,
  sizes,
  names,
  suffixes,
)
FILES = sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
  assert FILES
  problems = []
  for path in FILES:
    problems += rule(module_name(path), path.read_text())
  assert not problems, "\n" + "\n".join(problems)


LICENCE = "# SPDX-License-Identifier: Apache-2.0\n"
BAD = [
  (wrong_direction, "moejax.models.moe", "from moejax.train import train"),
  (wrong_direction, "moejax.ops.attention", "import moejax.models"),
  (wrong_direction, "moejax.config", "from moejax import routing"),
  (wrong_direction, "moejax.data.mixture", "from moejax.data import command"),
  (wrong_direction, "moejax.losses", "def f():\n  from moejax import plan"),
  (wrong_direction, "moejax.train", "from configs import tiny"),
  (wrong_direction, "moejax.novelty", ""),
  (wrong_direction, "moejax.train", "from moejax import novelty"),
  (crossed_swap_points, "moejax.routing.x", "from moejax import experts"),
  (crossed_swap_points, "moejax.dispatch.x", "import moejax.routing.top_k"),
  (crossed_swap_points, "moejax.experts", "from moejax.dispatch import dense"),
  (crossed_swap_points, "moejax.ops.x", "from moejax.routing import top_k"),
  (crossed_swap_points, "moejax.models.x", "from moejax.parallel import mesh"),
  (crossed_swap_points, "moejax.models.x", "from moejax import losses"),
  (collectives, "moejax.train", "import jax\njax.lax.psum(1, 'x')"),
  (collectives, "moejax.dispatch.x", "from jax import shard_map"),
  (collectives, "moejax.models.x", "from jax.lax import all_to_all"),
  (hidden_options, "moejax.train", "config.optimizer.get('b1', 0.9)"),
  (hidden_options, "configs.tiny", "x = cfg.get('b1', default=0.9)"),
  (hidden_options, "moejax.train", "getattr(self.config, 'b1', 0.9)"),
  (sizes, "moejax.train", LICENCE + "x = 1\n" * MAX_FILE),
  (sizes, "moejax.step", "def train():\n" + "  x = 1\n" * MAX_FUNCTION),
  (names, "moejax.data.utils", LICENCE),
  (names, "moejax.data.rows", "import jax"),
  (suffixes, "moejax.losses", "logits_BTQ = 1"),
  (suffixes, "moejax.losses", "def f(x_Q): pass"),
]


@pytest.mark.parametrize("rule, module, source", BAD)
def test_rule_can_fail(rule, module, source):
  assert rule(module, source)


GOOD = [
  (wrong_direction, "moejax.train", "from moejax.models import Transformer"),
  (wrong_direction, "moejax.models.moe", "from moejax.dispatch import dense"),
  (wrong_direction, "moejax.data.command", "from moejax import cli"),
  (wrong_direction, "tests.test_train", "import configs.tiny"),
  (crossed_swap_points, "moejax.dispatch.x", "from moejax.routing import base"),
  (crossed_swap_points, "moejax.models.x", "from moejax.routing import top_k"),
  (collectives, "moejax.parallel.x", "import jax\njax.lax.psum(1, 'x')"),
  (hidden_options, "moejax.train", "kinds.get('b1', 0.9)\nconfig.get('b1')"),
  (sizes, "moejax.train", "def train():\n" + "  x = 1\n" * MAX_FUNCTION),
  (suffixes, "moejax.losses", "x_BT1 = w_gate_EDF = MAX_BYTES = 1"),
  (suffixes, "moejax.losses", '"""Own: `Q` queues."""\nx_Q = 1'),
]


@pytest.mark.parametrize("rule, module, source", GOOD)
def test_rule_can_pass(rule, module, source):
  assert not rule(module, source)
