"""HTML from values: escaped names, numbers, tables, pictures."""

import base64
import html
import io
import unicodedata
from collections.abc import Sequence

from PIL import Image

NONE = "\N{EN DASH}"
"""Shown for a number that there is not."""
TIMES = "\N{MULTIPLICATION SIGN}"


def escape(value: object) -> str:
    """Return text for HTML, also within the quotes of an attribute; control characters and surrogates are replaced."""
    clean = (c if unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return html.escape("".join(clean), quote=True)


def name(value: object) -> str:
    """Return a name that a user chose: escaped, and isolated, so that one written from right to left moves nothing
    beside it."""
    return f"<bdi>{escape(value)}</bdi>"


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """Return a number with a fixed number of digits, with a real minus sign."""
    if value is None or value != value:
        return NONE
    return f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def with_spread(values: Sequence[float], digits: int = 2, *, signed: bool = False) -> str:
    """Return the mean of values and, where there are several, their standard deviation."""
    if not values:
        return NONE
    mean = sum(values) / len(values)
    text = number(mean, digits, signed=signed)
    if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        text += f" ± {number(variance**0.5, digits)}"
    return text


def large(value: float, units: Sequence[str], step: int = 1000) -> str:
    """Return a large number in the first unit in which it is less than `step`, with three digits."""
    for unit in units:
        if value < step or unit == units[-1]:
            break
        value /= step
    digits = 0 if value >= 100 or float(value).is_integer() else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}".strip()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return a table of HTML cells, whose first column has the rows' names. A narrow screen scrolls it sideways.

    Args:
        head: Of each column.
        rows: Cells of each row.
        caption: Below the table.
    """
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
        + (note(caption) if caption else "")
    )


def note(text: str) -> str:
    """Return a paragraph in small print, of HTML."""
    return f'<p class="note">{text}</p>'


def missing(text: str) -> str:
    """Return the line that stands for what is left out, of plain text."""
    return f'<p class="missing">Left out: {escape(text)}</p>'


def section(anchor: str, title: str, *parts: str) -> str:
    """Return a section of the page.

    Args:
        anchor: Its id.
        title: Its heading, HTML.
        *parts: Its content, HTML.
    """
    return f'<section id="{anchor}"><h2>{title}</h2>{"".join(parts)}</section>'


def picture(image: Image.Image, about: str) -> str:
    """Return an image as an element that holds its bytes.

    Args:
        image: 8 bits per channel.
        about: Says what it shows.
    """
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    content = base64.b64encode(stream.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img alt="{escape(about)}" src="data:image/jpeg;base64,{content}" {size}>'
