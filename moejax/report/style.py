# SPDX-License-Identifier: Apache-2.0
"""How the pictures look: one palette, one font size, few lines.

Curves are drawn in the light palette. In the page each colour becomes a CSS
variable, so the same SVG follows the reader's light or dark scheme. The hues
are those of Okabe & Ito (2008), told apart by colour-blind readers.
"""

import contextlib
import functools
import io
import re
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any

# Every colour once only: the page finds roles by value.
LIGHT = {
  "ink": "#1c2430",
  "soft": "#667085",
  "grid": "#e7eaf0",
  "card": "#ffffff",
  "blue": "#0b6bb3",
  "orange": "#d9570d",
  "green": "#098a66",
  "purple": "#a3508c",
  "faint": "#c3c9d4",
}
DARK = {
  "ink": "#e8ebf0",
  "soft": "#9aa4b5",
  "grid": "#2c3440",
  "card": "#181d25",
  "blue": "#5bb0ee",
  "orange": "#ff9152",
  "green": "#3ccaa0",
  "purple": "#dd94c8",
  "faint": "#4b5565",
}
# On the colour map, whose middle is light in both schemes.
MARK = "#10151d"
# Under fair share, fair, over: blue and orange differ in every colour vision.
LOAD_COLOURS = (
  "#08306b", "#2171b5", "#9ecae1", "#f2f2ee", "#fdbe85", "#e6550d", "#7f2704"
)  # fmt: skip
FONTS = (
  "Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans",
  "DejaVu Sans",
)  # fmt: skip
# What matplotlib says of letters that no font here has, or that run together.
_NO_GLYPH = (r"Glyph \d+ .* missing from", r"Matplotlib currently does not sup")
# Pictures are laid out in CSS pixels, drawn 1:1 on a phone and a desktop.
PIXELS_PER_INCH = 72


@contextlib.contextmanager
def plot_style() -> Iterator[None]:
  """Matplotlib settings of all pictures.

  Names come from data: they may hold a `$`, which is no TeX, and letters that
  the font lacks, which a PNG then shows as boxes; the page has the reader's.
  """
  import matplotlib

  settings = {
    "font.family": "sans-serif",
    "font.sans-serif": [_font()],
    "font.size": 11.0,
    "axes.titlesize": 11.0,
    "axes.labelsize": 11.0,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.edgecolor": LIGHT["faint"],
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 1.0,
    "axes.axisbelow": True,
    "axes.linewidth": 1.0,
    "xtick.major.size": 3.5,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,
    "svg.fonttype": "none",
    "savefig.facecolor": "none",
    "figure.dpi": PIXELS_PER_INCH,
  }
  with matplotlib.rc_context(settings), warnings.catch_warnings():
    for message in _NO_GLYPH:
      warnings.filterwarnings("ignore", message, UserWarning)
    yield


@functools.cache
def _font() -> str:
  """The first installed of FONTS; asking for others makes matplotlib warn."""
  from matplotlib import font_manager

  installed = set(font_manager.get_font_names())
  return next(name for name in FONTS if name in installed)


def short_name(name: str, most: int = 32) -> str:
  """A name from outside as a label: one line, its middle left out if long.

  A label that is wider than its picture leaves no room for the axes.

  Args:
    name: of a domain, a source, a phase or a run.
    most: width in letters; Chinese and such ones count for two.
  """
  name = " ".join(name.split())
  width = [1 + (unicodedata.east_asian_width(c) in "WF") for c in name]
  if sum(width) <= most:
    return name
  first, last, room = 0, len(name), most - 1
  while True:  # from both ends in turn
    turn = first if first <= len(name) - last else last - 1
    room -= width[turn]
    if room < 0:
      return f"{name[:first]}…{name[last:]}"
    first, last = (first + 1, last) if turn == first else (first, last - 1)


def new_figure(width: float, height: float) -> Any:
  """A figure of `width` x `height` CSS pixels."""
  from matplotlib.figure import Figure

  size = (width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
  return Figure(figsize=size, layout="constrained")


def to_svg(figure: Any, name: str, label: str) -> str:
  """The figure as an inline `<svg>` that follows the page's colours and font.

  Args:
    figure: drawn with `plot_style`.
    name: unique in the page; keeps the ids of several pictures apart.
    label: what a screen reader says.
  """
  import html

  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
  text = buffer.getvalue()
  text = text[text.index("<svg") :]
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  # Matplotlib's global `*` rule would style the whole page.
  text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
  text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
  text = re.sub(r'\bid="', f'id="{name}-', text)
  text = text.replace("url(#", f"url(#{name}-")
  text = text.replace('href="#', f'href="#{name}-')
  for role, colour in LIGHT.items():
    text = text.replace(colour, f"var(--{role})")
  text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
  label = html.escape(label, quote=True)
  view = re.search(r'viewBox="[^"]*"', text)[0]
  opening = f'<svg xmlns="http://www.w3.org/2000/svg" {view} role="img" '
  opening += f'aria-label="{label}">'
  return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).strip()


def load_colour_map() -> Any:
  """Blue below, near white at, orange above the fair share."""
  from matplotlib.colors import LinearSegmentedColormap

  return LinearSegmentedColormap.from_list("load", LOAD_COLOURS)
