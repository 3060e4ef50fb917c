# SPDX-License-Identifier: Apache-2.0
"""The page's tables of tokens: which are shown, and what their signs are."""

import re

import numpy as np

from moejax.analysis import page


def test_tokens_below_chance_are_not_shown_and_signs_are_told():
  """Expert 0 has two thirds of all, expert 2 a noise of one token."""
  rows = [
    (0, "␣", 0.9, 2 / 3), (0, "b", 0.66, 2 / 3), (1, "#257", 0.4, 1 / 3),
    (1, "⏎", 0.2, 1 / 3), (2, "|", 0.0011, 1 / 3),
  ]  # fmt: skip
  expert, spelt, share, chance = map(np.array, zip(*rows))
  names = np.array(["layer 0"] * len(rows)), np.array(["input"] * len(rows))
  source = page._token_tables(
    dict(
      zip(
        ("router", "kind", "expert", "text", "top_share", "chance"),
        (*names, expert, spelt, share, chance),
      )
    ),
    num_experts=3,
  )
  shown = re.findall(r'<code class="value">(.*?)</code> ([^<]*)', source)
  assert [(x, share.strip()) for x, share in shown] == [
    ("␣", "90\u00a0%"), ("#257", "40\u00a0%")
  ]  # fmt: skip
  first = source[: source.index("by the predicted next token")]
  assert "<td>expert&nbsp;2</td><td>none above chance</td>" in first
  assert first.count("none above chance") == 1
  assert "1/E (33.3\u00a0%)" in source and "␣ is a space; #257 is" in source
  assert "⏎ is" not in source  # it is not on the page
