# SPDX-License-Identifier: Apache-2.0
"""The table of a config, by the command."""

from pathlib import Path

from moejax.__main__ import main

CONFIGS = Path(__file__).parents[1] / "configs"


def test_hunyuan_large_as_published(capsys):
  assert main(["describe", f"--config={CONFIGS / 'hunyuan_large.py'}"]) == 0
  out = capsys.readouterr().out
  total = next(x for x in out.splitlines() if x.startswith("total"))
  assert total.split() == ["total", "388,698,128,640", "51,318,800,640"]
  assert "81,920 bytes, 5.0% of plain attention's 1,638,400" in out
  assert max(map(len, out.splitlines())) <= 88


def test_parts_add_up_to_the_total(capsys):
  main([
    "describe", f"--config={CONFIGS / 'jetmoe_8b.py'}:tiny",
    "--config.model.moe.d_expert=64",
  ])  # fmt: skip
  rows = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
  numbers = [
    [int(word.replace(",", "")) for word in row.split()[-2:]] for row in rows
  ]
  for column in zip(*numbers):
    assert sum(column[:-1]) == column[-1]


def test_a_wrong_option_is_one_line(capsys):
  config = f"--config={CONFIGS / 'tiny.py'}"
  assert main(["describe", config, "--config.model.layers=3"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
