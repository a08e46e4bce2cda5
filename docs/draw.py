"""Draw docs/images/mgd.svg, how the package teaches a student: `python docs/draw.py`.

The background is transparent and every colour is a middle one, so that the picture is readable on white and on black.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Polygon

PICTURE = Path(__file__).parent / "images" / "mgd.svg"
TEACHER, STUDENT, LOSS = "#3f74b5", "#2f8f5b", "#d06a1f"
LINE = "#7d8590"
"""Lines and words outside of boxes."""
TOP, BOTTOM = 3.3, 0.9
"""Heights of the teacher's row and of the student's."""
ABSTRACT, DETAILED, LOGITS = 5.5, 8.5, 11.4
"""Where the codes and the logits stand from left to right."""
HEIGHTS = {ABSTRACT: 0.42, DETAILED: 1.0}
"""A wider code is drawn as a taller bar."""


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=colour, linewidth=0)
    )
    axes.text(x, y, text, ha="center", va="center", color="white", fontsize=10, weight="bold", linespacing=1.3)


def words(axes: Axes, x: float, y: float, text: str, colour: str = LINE, align: str = "center") -> None:
    axes.text(x, y, text, ha=align, va="center", color=colour, fontsize=10, linespacing=1.25)


def line(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """A line through points, with an arrow at its end."""
    axes.plot(*zip(*points, strict=True), color=LINE, linewidth=1.4, solid_joinstyle="round", zorder=0)
    axes.annotate(
        "", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0}
    )


def loss(axes: Axes, x: float, top: float, bottom: float, text: str) -> None:
    style = {"arrowstyle": "-|>", "color": LOSS, "linestyle": (0, (4, 2)), "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, bottom), (x, top), arrowprops=style)
    words(axes, x + 0.12, (top + bottom) / 2, text, LOSS, "left")


def code(axes: Axes, x: float, y: float, colour: str, *, decode: bool) -> None:
    """An encoder, the code that it gives as a bar, and the teacher's decoder behind it."""
    half = HEIGHTS[x] / 2
    sides = (-1, 1) if decode else (-1,)
    for side in sides:
        outer, inner = x + side * 1.0, x + side * 0.2
        corners = [(outer, y - 0.6), (outer, y + 0.6), (inner, y + half), (inner, y - half)]
        axes.add_patch(Polygon(corners, facecolor=colour, alpha=0.85, linewidth=0))
    axes.add_patch(
        Polygon(
            [(x - 0.11, y - half), (x - 0.11, y + half), (x + 0.11, y + half), (x + 0.11, y - half)],
            facecolor=colour,
            linewidth=0,
        )
    )
    axes.text(x - 0.6, y, "encoder", ha="center", va="center", color="white", fontsize=8.5)
    if decode:
        axes.text(x + 0.6, y, "decoder", ha="center", va="center", color="white", fontsize=8.5)


def draw(path: Path) -> None:
    """Write the picture as an SVG."""
    matplotlib.rcParams.update({"svg.hashsalt": "mgd", "font.family": "DejaVu Sans"})
    figure, axes = pyplot.subplots(figsize=(11.6, 4.8))
    axes.set(xlim=(0, 12.7), ylim=(-0.4, 4.85), aspect="equal")
    axes.axis("off")

    box(axes, 0.65, 2.1, 1.1, 0.7, "images", LINE)
    box(axes, 2.5, TOP, 1.6, 1.3, "teacher\n(frozen)", TEACHER)
    box(axes, 2.5, BOTTOM, 1.3, 0.9, "student", STUDENT)
    line(axes, [(1.2, 2.25), (1.45, 2.25), (1.45, TOP), (1.7, TOP)])
    line(axes, [(1.2, 1.95), (1.45, 1.95), (1.45, BOTTOM), (1.85, BOTTOM)])

    line(axes, [(3.3, TOP), (ABSTRACT - 1.0, TOP)])
    line(axes, [(3.75, TOP), (3.75, 2.5), (7.15, 2.5), (7.15, TOP), (DETAILED - 1.0, TOP)])
    words(axes, 3.88, TOP + 0.2, "embedding")
    line(axes, [(3.15, BOTTOM), (ABSTRACT - 1.0, BOTTOM)])
    line(axes, [(3.75, BOTTOM), (3.75, 0.1), (7.15, 0.1), (7.15, BOTTOM), (DETAILED - 1.0, BOTTOM)])
    line(axes, [(2.5, BOTTOM - 0.45), (2.5, -0.1), (9.9, -0.1), (9.9, BOTTOM), (LOGITS - 0.8, BOTTOM)])
    for place, name in ((ABSTRACT, "abstract code, 64-d"), (DETAILED, "detailed code, 256-d")):
        code(axes, place, TOP, TEACHER, decode=True)
        code(axes, place, BOTTOM, STUDENT, decode=False)
        words(axes, place, TOP + 0.78, name)

    line(axes, [(2.5, TOP + 0.65), (2.5, 4.65), (LOGITS, 4.65), (LOGITS, TOP + 0.65)])
    words(axes, 3.2, 4.48, "teacher's logits", align="left")
    line(
        axes,
        [(ABSTRACT + 1.0, TOP), (6.8, TOP), (6.8, 4.3), (10.0, 4.3), (10.0, TOP + 0.25), (LOGITS - 0.95, TOP + 0.25)],
    )
    line(axes, [(DETAILED + 1.0, TOP - 0.25), (LOGITS - 0.95, TOP - 0.25)])
    words(axes, 10.0, TOP - 0.45, "views", align="center")
    box(axes, LOGITS, TOP, 1.9, 1.3, "mean of logits:\nstable\nexcitation", TEACHER)
    box(axes, LOGITS, BOTTOM, 1.6, 0.7, "logits", STUDENT)
    loss(axes, ABSTRACT, TOP - HEIGHTS[ABSTRACT] / 2, BOTTOM + HEIGHTS[ABSTRACT] / 2, "KL at T=2")
    loss(axes, DETAILED, TOP - HEIGHTS[DETAILED] / 2, BOTTOM + HEIGHTS[DETAILED] / 2, "KL at T=8")
    loss(axes, LOGITS, TOP - 0.65, BOTTOM + 0.35, "KD at T=4")
    box(axes, LOGITS, -0.15, 1.0, 0.42, "labels", LINE)
    style = {"arrowstyle": "-|>", "color": LOSS, "linestyle": (0, (4, 2)), "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (LOGITS, BOTTOM - 0.35), (LOGITS, 0.06), arrowprops=style)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    draw(parser.parse_args().output)
