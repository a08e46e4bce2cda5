"""Charts as inline SVG, drawn in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mgd_timm.report.calibration import BINS, Calibration
from mgd_timm.report.markup import escape, name, number

COLOURS = 8
"""Colours of the page's style: classes c0 to c7."""
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 36  # margins of the plot


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        group: Number of the group, from 0, which is its colour and dashes.
        label: Said where a pointer rests on it.
        points: (x, y), in the order of x.
    """

    group: int
    label: str
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers that span a range, `count` steps or somewhat more."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def style_of(group: int) -> str:
    """Return the classes of a group's line: its colour, and its dashes, which print tells apart."""
    return f"c{group % COLOURS} d{group % 4}"


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Return a chart of lines; points that are not finite are left out.

    Args:
        title: Plain text.
        lines: With one finite point or more among them.
        x_label: Below the axis.
        y_label: Above the axis, beside the title.
    """
    kept = [Line(one.group, one.label, [p for p in one.points if math.isfinite(p[1])]) for one in lines]
    every = [point for line in kept for point in line.points]
    xs = [x for x, _ in every]
    x_ticks = [x for x in ticks(min(xs), max(xs)) if min(xs) <= x <= max(xs) and x.is_integer()] or [min(xs)]
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))
    x_span, y_span = (max(xs) - min(xs)) or 1, y_ticks[-1] - y_ticks[0]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        across = (x - min(xs)) / x_span if len(set(xs)) > 1 else 0.5
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_ticks[0]) / y_span * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_y_tick(y, place((min(xs), y))[1], y_ticks) for y in y_ticks]
    parts += [_x_tick(f"{x:g}", place((x, y_ticks[0]))[0]) for x in x_ticks]
    for line in kept:
        parts.append(_polyline(line, [place(point) for point in line.points]))
    parts.append(_axis_label(x_label))
    heading = f'<figcaption>{name(title)} <span class="unit">{escape(y_label)}</span></figcaption>'
    return f"<figure>{heading}{_svg(f'{title} by {x_label}', parts)}</figure>"


def reliability_diagram(title: str, found: Calibration) -> str:
    """Return a reliability diagram: accuracy by confidence, the share of images as the bars' strength."""
    side = HEIGHT - TOP - BOTTOM
    width = (WIDTH - LEFT - RIGHT) / BINS
    base = HEIGHT - BOTTOM
    parts = [_y_tick(y, base - y * side, (0, 0.25, 1)) for y in (0, 0.25, 0.5, 0.75, 1)]
    parts += [_x_tick(f"{x:g}", LEFT + x * width * BINS) for x in (0, 0.25, 0.5, 0.75, 1)]
    rows = zip(found.share, found.confidence, found.accuracy, strict=True)
    for place, (share, confidence, accuracy) in enumerate(rows):
        if not share:
            continue
        strength = 0.25 + 0.75 * (share / max(found.share)) ** 0.5
        about = f"confidence {confidence:.3f}, accuracy {accuracy:.3f}, {100 * share:.1f} % of the images"
        parts.append(
            f'<rect class="bar" x="{LEFT + place * width + 1:.1f}" y="{base - accuracy * side:.1f}" '
            f'width="{width - 2:.1f}" height="{max(accuracy * side, 1):.1f}" fill-opacity="{strength:.2f}">'
            f"<title>{about}</title></rect>"
        )
    parts.append(f'<line class="diagonal" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{TOP}"/>')
    parts.append(_axis_label("confidence"))
    heading = f"{name(title)} <span class='unit'>accuracy; ECE {number(100 * found.error)} %</span>"
    return f"<figure><figcaption>{heading}</figcaption>{_svg(f'{title}: accuracy by confidence', parts)}</figure>"


def heat_map(title: str, values: Sequence[Sequence[float]], *, rows: str, columns: str) -> str:
    """Return a table of values from 0 to 1 in shades, with the numbers in it.

    Args:
        title: Plain text.
        values: Rows of equal length.
        rows, columns: What they stand for; each is numbered from 1.
    """
    width = (WIDTH - LEFT - RIGHT) / len(values[0])
    height = (HEIGHT - TOP - BOTTOM) / len(values)
    parts = []
    for i, row in enumerate(values):
        y = TOP + i * height
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{i + 1}</text>')
        for j, value in enumerate(row):
            x, shade = LEFT + j * width, value if math.isfinite(value) else 0.0
            parts.append(
                f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height - 2:.1f}" '
                f'fill-opacity="{shade:.3f}"/><text class="value{" strong" if shade > 0.6 else ""}" '
                f'x="{x + width / 2 - 1:.1f}" y="{y + height / 2 + 3:.1f}" text-anchor="middle">{number(value)}</text>'
            )
    parts += [_x_tick(str(j + 1), LEFT + (j + 0.5) * width) for j in range(len(values[0]))]
    parts.append(_axis_label(columns))
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = f'transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="tick" {turned}>{escape(rows)}</text>')
    return f"<figure><figcaption>{name(title)}</figcaption>{_svg(title, parts)}</figure>"


def change_bar(change: float, largest: float) -> str:
    """Return a bar from the middle: to the right for a gain, to the left for a loss.

    Args:
        change: Signed.
        largest: Of all that are drawn, which reaches the edge.
    """
    length = 60 * abs(change) / (largest or 1)
    kind, x = ("gain", 60.0) if change >= 0 else ("loss", 60 - length)
    return (
        '<svg class="change" viewBox="0 0 120 12" aria-hidden="true">'
        '<line class="grid" x1="60" x2="60" y1="0" y2="12"/>'
        f'<rect class="{kind}" x="{x:.1f}" y="2" width="{length:.1f}" height="8"/></svg>'
    )


def legend(labels: Sequence[str]) -> str:
    """Return the legend of all charts of lines, by number of the group."""
    items = (
        f'<li><svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><line class="line {style_of(group)}" x1="0" '
        f'y1="4" x2="28" y2="4"/></svg>{name(label)}</li>'
        for group, label in enumerate(labels)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(about: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">{"".join(parts)}</svg>'


def _y_tick(value: float, y: float, every: Sequence[float]) -> str:
    step = every[1] - every[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if f"{step:e}".startswith("2.5") else 0)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value, digits)}</text>'
    )


def _x_tick(text: str, x: float) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{text}</text>'


def _axis_label(text: str) -> str:
    x = LEFT + (WIDTH - LEFT - RIGHT) / 2
    return f'<text class="tick" x="{x:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(text)}</text>'


def _polyline(line: Line, places: Sequence[tuple[float, float]]) -> str:
    path, about = " ".join(f"{x:.1f},{y:.1f}" for x, y in places), f"<title>{escape(line.label)}</title>"
    drawn = f'<polyline class="line {style_of(line.group)}" points="{path}">{about}</polyline>'
    if len(places) > 12:
        return drawn
    dots = (
        f'<circle class="dot {style_of(line.group)}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(line.label)}, '
        f"{point[0]:g}: {point[1]:.4g}</title></circle>"
        for (x, y), point in zip(places, line.points, strict=True)
    )
    return drawn + "".join(dots)
