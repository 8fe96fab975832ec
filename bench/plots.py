"""SVG by hand: grouped bars and lines, for a page that loads nothing.

Colours are the classes c0, c1, ... and text takes the colour of the page, so that the page's style
decides how a plot looks in the light and in the dark.
"""

from __future__ import annotations

import math
from html import escape

COLOURS = 12
WIDTH = 760
BAR, GAP, LABEL = 15, 14, 20  # heights of a bar, between groups, of a group's title


def svg(height: float, body: list[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(body)
        + "</svg>"
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
        f"{escape(words)}</text>"
    )


def legend(names: list[str], shown: set[str]) -> str:
    """Those of the names that are shown, with their colours, as HTML above a plot."""
    keys = (
        f'<span class="key"><i class="c{n % COLOURS}"></i>{escape(name)}</span>'
        for n, name in enumerate(names)
        if name in shown
    )
    return f'<p class="legend">{"".join(keys)}</p>'


def bars(
    groups: list[tuple[str, dict[str, float]]],
    names: list[str],
    unit: str,
    line: float | None = None,
) -> str:
    """Horizontal bars, a group per label; values by name, those that are missing left out.

    line: a value to draw a rule at.
    """
    values = [value for _, own in groups for value in own.values()]
    top = ceiling(max([*values, line or 0.0, 1e-12]))
    left, right = 8, WIDTH - 92
    scale = (right - left) / top
    body, y = [], 4.0
    for label, own in groups:
        body.append(text(left, y + LABEL - 6, label, kind="strong"))
        y += LABEL
        for number, name in enumerate(names):
            if name not in own:
                continue
            width = max(1.0, own[name] * scale)
            body.append(
                f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 3}" rx="2" '
                f'class="c{number % COLOURS}"><title>{escape(name)}: {own[name]:.4g} {unit}'
                "</title></rect>"
            )
            body.append(
                text(left + width + 5, y + BAR - 5, f"{own[name]:.3g} {unit}", kind="small")
            )
            y += BAR
        y += GAP
    if line is not None:
        x = left + line * scale
        body.insert(0, f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y:.0f}" class="rule"/>')
    return svg(y, body, f"bars in {unit}")


def lines(series: dict[str, list[tuple[int, float]]], names: list[str], unit: str) -> str:
    """Values over lengths, the lengths on a logarithmic axis; one line per name."""
    height, left, right, top, bottom = 300, 56, WIDTH - 20, 16, 258
    points = [point for own in series.values() for point in own]
    lengths = sorted({x for x, _ in points})
    highest = ceiling(max(y for _, y in points))
    low, high = math.log2(lengths[0]), math.log2(lengths[-1])

    def place(x, y):
        share = (math.log2(x) - low) / (high - low) if high > low else 0.5
        return left + share * (right - left), bottom - y / highest * (bottom - top)

    body = []
    for step in range(5):
        value = highest * step / 4
        y = place(lengths[0], value)[1]
        body.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(text(left - 6, y + 4, f"{value:.3g}", "end", "small"))
    for length in lengths:
        body.append(text(place(length, 0)[0], bottom + 18, str(length), "middle", "small"))
    body.append(text((left + right) / 2, height - 6, f"length; {unit}", "middle", "small"))
    for number, name in enumerate(names):
        own = sorted(series.get(name, []))
        if not own:
            continue
        colour = f"c{number % COLOURS}"
        track = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in own))
        body.append(f'<polyline points="{track}" class="line {colour}"/>')
        for point in own:
            x, y = place(*point)
            body.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{colour}"><title>'
                f"{escape(name)}, {point[0]}: {point[1]:.4g} {unit}</title></circle>"
            )
    return svg(height, body, f"{unit} over length")


def ceiling(value: float) -> float:
    """The next of 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return next(step * power for step in steps if step * power >= value * (1 - 1e-9))
