"""Picture: how far the blocks of an array are, as HTML for notebooks, with the facts about the array beside it.

A grid of block states becomes an SVG of cells: one for each block up to about 64 x 64 of them; of more, each cell
stacks the shares of several, and none is so small that it vanishes. Colours follow the page into dark mode, and differ
in lightness, in the order of the states. Lengths in the SVG are CSS pixels. This module knows no store and no array:
states and texts are all it gets.

Examples
--------
>>> states = np.array([DURABLE, DURABLE, WRITTEN, PENDING], dtype=np.uint8)
>>> print(html("frames.npy", [("shape", "(1000, 300)")], states))
<div class="bs-..."><style>...aria-label="4 blocks: 1 pending, 1 written, 2 durable"...</div>
"""

import math
import os
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["DURABLE", "PENDING", "WRITTEN", "html"]

PENDING: Final = 0
WRITTEN: Final = 1
DURABLE: Final = 2

_NAMES = ("pending", "written", "durable")

_COLOURS = (("#d0d7df", "#444c57"), ("#ec9a29", "#d1862a"), ("#17508f", "#a9d4ff"))
"""Of each state, on light pages and on dark ones: ever further from the page in lightness, and none of red or green."""

_ONE_BY_ONE = 64 * 64
"""Blocks up to which each has its own cell."""

_LONGEST = 128
"""Cells along an axis beyond which a grid is drawn as a strip."""

_COLUMNS, _ROWS = 64, 48
"""Cells of a picture in which each stands for several blocks, at most."""

_WIDTH, _HEIGHT = 512, 384
"""What a picture should not exceed, and does only where cells were smaller than `_SMALLEST`."""

_FAINT = "#bbb"
"""Of the gaps between cells of several blocks: what is shown is a map, in which the pending should stand out."""

_SMALLEST, _LARGEST = 4, 24
"""Sides of a cell, with the gap of 1 behind it."""

_LEAST = np.array([3, 2, 2])
"""Height of the smallest share of each state, the gap below it included: what is missing must catch the eye."""


_STYLE = """
.TOKEN{color:var(--jp-ui-font-color1,var(--vscode-foreground,inherit));max-width:100%;
font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);font-variant-numeric:tabular-nums;
--TOKEN-0:LIGHT0;--TOKEN-1:LIGHT1;--TOKEN-2:LIGHT2}
@supports (color:light-dark(red,red)){.TOKEN{--TOKEN-0:light-dark(LIGHT0,DARK0);
--TOKEN-1:light-dark(LIGHT1,DARK1);--TOKEN-2:light-dark(LIGHT2,DARK2)}}
[data-jp-theme-light="true"] .TOKEN,[data-theme="light"] .TOKEN,.vscode-light .TOKEN,
.vscode-high-contrast-light .TOKEN{color-scheme:light}
[data-jp-theme-light="false"] .TOKEN,[data-theme="dark"] .TOKEN,html[theme="dark"] .TOKEN,.vscode-dark .TOKEN,
.vscode-high-contrast:not(.vscode-high-contrast-light) .TOKEN{color-scheme:dark}
.TOKEN-pending{fill:var(--TOKEN-0);background:var(--TOKEN-0)}
.TOKEN-written{fill:var(--TOKEN-1);background:var(--TOKEN-1)}
.TOKEN-durable{fill:var(--TOKEN-2);background:var(--TOKEN-2)}
.TOKEN-title{font-weight:600;font-size:14px;margin:2px 0 6px;overflow-wrap:anywhere}
.TOKEN-row{display:flex;flex-wrap:wrap;gap:14px 32px;align-items:flex-start}
.TOKEN.TOKEN table.TOKEN-facts{border-collapse:collapse;table-layout:auto;border:0;margin:0;
font-size:inherit;color:inherit}
.TOKEN.TOKEN table.TOKEN-facts tr.TOKEN-fact{background:none;border:0}
.TOKEN.TOKEN table.TOKEN-facts .TOKEN-fact th,.TOKEN.TOKEN table.TOKEN-facts .TOKEN-fact td{padding:1px 0;border:0;
text-align:left;vertical-align:top;line-height:inherit;background:none;color:inherit;max-width:32em;overflow-wrap:anywhere}
.TOKEN.TOKEN table.TOKEN-facts .TOKEN-fact th{padding-right:16px;font-weight:400;opacity:.7;white-space:nowrap}
.TOKEN-picture{min-width:0;max-width:100%}
.TOKEN-picture svg{display:block;max-width:100%;height:auto;margin:2px 0 8px}
.TOKEN-legend{display:flex;flex-wrap:wrap;gap:2px 18px}
.TOKEN-key{white-space:nowrap}
.TOKEN-key b{font-weight:600}
.TOKEN-key small{font-size:inherit;opacity:.7}
.TOKEN-swatch{display:inline-block;width:11px;height:11px;margin-right:6px;vertical-align:-1px;
forced-color-adjust:none;print-color-adjust:exact}
.TOKEN-caption{max-width:512px;font-size:12px;opacity:.7;margin-top:2px}
"""
for _state, (_light, _dark) in enumerate(_COLOURS):
    _STYLE = _STYLE.replace(f"LIGHT{_state}", _light).replace(f"DARK{_state}", _dark)


class _Drawing(NamedTuple):
    """Which blocks the cells of a picture stand for."""

    counts: NDArray[np.int64]
    """Blocks in each state of each cell, shape (rows, columns, 3); all 0 where a strip has ended."""
    per_cell: tuple[int, ...]
    """Blocks of a cell along each axis of the drawing, fewer at the edges."""
    order: str
    """How blocks became cells, where they are not simply at their place."""


def html(title: str, facts: Sequence[tuple[str, str]], states: NDArray[np.uint8]) -> str:
    """Return the picture of an array.

    Parameters
    ----------
    title : str
        What stands above, as text.
    facts : sequence of tuple of str
        Names and values of what is to be told about the array, as text.
    states : ndarray of uint8, any shape
        For each block `PENDING`, `WRITTEN` or `DURABLE`; the shape is that of the grid of blocks.

    Returns
    -------
    str
        A ``div`` that needs nothing else and touches nothing else: its classes and ids are its own. It is well-formed
        as XML, too. The picture in it has less than 200 kB.

    Raises
    ------
    ValueError
        If a state is none of the three.

    Notes
    -----
    O(blocks), vectorized: a million take some 20 ms. An axis of one block is left out of the picture. A grid that is
    much longer than wide is drawn as a strip, one block after another, if that shows more.

    The page decides between light and dark: by its CSS ``color-scheme`` (``light dark`` follows the system's
    ``prefers-color-scheme``) or as JupyterLab, VS Code, Colab and Sphinx themes mark it. A page that says nothing is
    light, whatever the system prefers; so is all in browsers without ``light-dark()``, those from before 2024.
    """
    if states.size and states.max() > DURABLE:
        raise ValueError(f"the state of a block is 0, 1 or 2, not {states.max()}")
    totals = np.bincount(states.ravel(), minlength=3)
    token = f"bs-{os.urandom(5).hex()}"
    rows = "".join(
        f'<tr class="{token}-fact"><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>'
        for name, value in facts
    )
    label = f"{_blocks(states.size)}: " + ", ".join(f"{n:,} {name}" for n, name in zip(totals, _NAMES, strict=True))
    drawing = _strip(states.ravel()) if states.ndim < 2 else _drawing(states)
    legend = "".join(
        f'<span class="{token}-key"><i class="{token}-swatch {token}-{name}"></i>'
        f"{name} <b>{n:,}</b> <small>{_percent(int(n), states.size)}</small></span>"
        for n, name in zip(totals, _NAMES, strict=True)
    )
    return (
        f'<div class="{token}"><style>{_STYLE.replace("TOKEN", token)}</style>'
        f'<div class="{token}-title">{_text(title)}</div><div class="{token}-row">'
        f'<table class="{token}-facts"><tbody>{rows}</tbody></table>'
        f'<div class="{token}-picture">{_svg(drawing, token, label)}'
        f'<div class="{token}-legend">{legend}</div>'
        f'<div class="{token}-caption">{_caption(states, drawing)}</div></div></div></div>'
    )


def _strip(states: NDArray[np.uint8]) -> _Drawing:
    """Draw blocks one after another, line by line."""
    per = _per_cell_of_strip(states.size)
    starts = np.arange(0, states.size, per)
    columns = max(min(len(starts), _COLUMNS), 1)
    lines = -(-len(starts) // columns)
    counts = np.zeros((lines * columns, 3), np.int64)
    for state in (PENDING, WRITTEN, DURABLE) if states.size else ():
        counts[: len(starts), state] = np.add.reduceat(states == state, starts, dtype=np.int64)
    order = "in C order, line by line" if lines > 1 else ""
    return _Drawing(counts.reshape(lines, columns, 3), (per,), order)


def _per_cell_of_strip(count: int) -> int:
    return 1 if count <= _ONE_BY_ONE else -(-count // (_COLUMNS * _ROWS))


def _drawing(states: NDArray[np.uint8]) -> _Drawing:
    """Draw the last axis as columns, the others as rows; as a strip where that shows much more."""
    axes = [n for n in states.shape if n != 1]
    if states.size == 0 or len(axes) < 2:
        return _strip(states.ravel())
    grid = states.reshape(-1, axes[-1])
    rows, columns = grid.shape
    high, wide = 1, 1
    if states.size > _ONE_BY_ONE:
        high, wide = -(-rows // _ROWS), -(-columns // _COLUMNS)
        if max(high, wide) <= 2 * min(high, wide):
            high = wide = max(high, wide)
    if high * wide > 4 * _per_cell_of_strip(states.size) or max(-(-rows // high), -(-columns // wide)) > _LONGEST:
        return _strip(states.ravel())
    tops, lefts = np.arange(0, rows, high), np.arange(0, columns, wide)
    counts = np.empty((len(tops), len(lefts), 3), np.int64)
    for state in (PENDING, WRITTEN, DURABLE):
        lines = np.add.reduceat(grid == state, tops, axis=0, dtype=np.int64)
        counts[..., state] = np.add.reduceat(lines, lefts, axis=1)
    order = "the leading axes are flattened into rows" if len(axes) > 2 else ""
    return _Drawing(counts, (high, wide), order)


def _svg(drawing: _Drawing, token: str, label: str) -> str:
    rows, columns = drawing.counts.shape[:2]
    if rows == 0:
        return (
            f'<svg role="img" aria-label="{label}" width="24" height="24" viewBox="0 0 24 24"><rect x="0.5" y="0.5" '
            'width="23" height="23" fill="none" stroke="currentColor" stroke-dasharray="3 2" opacity="0.5"/></svg>'
        )
    wide, high = _cell(rows, columns)
    paths: tuple[list[str], ...] = ([], [], [])
    for state, x, y, width, height in _rectangles(_heights(drawing.counts, high), wide, high):
        paths[state].append(f"M{x} {y}h{width}v{height}h-{width}z")
    lines = "".join(f"M{x * wide - 1} 0v{rows * high}h1V0z" for x in range(1, columns))
    lines += "".join(f"M0 {y * high - 1}h{columns * wide}v1H0z" for y in range(1, rows))
    width, height = columns * wide - 1, rows * high - 1
    gap = "#000" if math.prod(drawing.per_cell) == 1 else _FAINT
    return (
        f'<svg role="img" aria-label="{label}" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<mask id="{token}-gaps" maskUnits="userSpaceOnUse" x="0" y="0" width="{width}" height="{height}">'
        f'<rect width="{width}" height="{height}" fill="#fff"/><path d="{lines}" fill="{gap}"/></mask>'
        f'<g mask="url(#{token}-gaps)" shape-rendering="crispEdges">'
        + "".join(
            f'<path class="{token}-{name}" d="{"".join(path)}"/>'
            for name, path in zip(_NAMES, paths, strict=True)
            if path
        )
        + "</g></svg>"
    )


def _cell(rows: int, columns: int) -> tuple[int, int]:
    """Return the width and height of a cell, with the gap behind it: a square, unless few of them were a mere line."""
    side = min(max(min(_WIDTH // columns, _HEIGHT // rows), _SMALLEST), _LARGEST)
    longest = min(3 * side, _LARGEST)
    return min(max(160 // columns, side), longest), min(max(_LARGEST // rows, side), longest)


def _heights(counts: NDArray[np.int64], height: int) -> NDArray[np.int64]:
    """Return how high the share of each state is in each cell: exactly `height` in sum, and not 0 for what there is."""
    totals = counts.sum(axis=2, keepdims=True)
    least = np.where(counts > 0, np.where(counts == totals, height, _LEAST), 0)
    rest = np.where(totals > 0, height, 0) - least.sum(axis=2, keepdims=True)
    heights = least + rest * counts // np.maximum(totals, 1)
    left = np.where(totals > 0, height, 0)[..., 0] - heights.sum(axis=2)
    largest = counts.argmax(axis=2)[..., None]
    np.put_along_axis(heights, largest, np.take_along_axis(heights, largest, 2) + left[..., None], 2)
    return np.asarray(heights, np.int64)


def _rectangles(heights: NDArray[np.int64], wide: int, high: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield state, x, y, width and height of what is to be filled, cells that are alike side by side as one.

    Rows of cells that are alike are one, too, if none of their cells has several states.
    """
    uniform = ((heights > 0).sum(axis=2) <= 1).all(axis=1)
    top = 0
    while top < len(heights):
        bottom = top + 1
        while uniform[top] and bottom < len(heights) and np.array_equal(heights[top], heights[bottom]):
            bottom += 1
        row = heights[top]
        edges = np.flatnonzero((row[1:] != row[:-1]).any(axis=1)) + 1
        for left, right in zip([0, *edges.tolist()], [*edges.tolist(), len(row)], strict=True):
            y = top * high
            for state, height in enumerate(row[left].tolist()):
                if height:
                    height += (bottom - top - 1) * high
                    yield state, left * wide, y, (right - left) * wide, height
                    y += height
        top = bottom


def _caption(states: NDArray[np.uint8], drawing: _Drawing) -> str:
    notes = [_blocks(*states.shape)]
    if (per := math.prod(drawing.per_cell)) > 1:
        shape = f" ({_times(drawing.per_cell)})" if len(drawing.per_cell) > 1 else ""
        notes.append(f"each cell is {per:,} blocks{shape}")
    if drawing.order:
        notes.append(drawing.order)
    if states.size and states.max() > PENDING and states.min() == PENDING:
        first = [str(i) for i in np.unravel_index(states.argmin(), states.shape)]
        where = "(" + ",\u00a0".join(first) + ")" if len(first) > 1 else first[0]
        notes.append(f"the first pending block is\u00a0{where}")
    return "; ".join(notes)


def _blocks(*counts: int) -> str:
    return f"{_times(counts)} block{'' if math.prod(counts) == 1 else 's'}"


def _times(counts: Sequence[int]) -> str:
    return " \u00d7 ".join(f"{n:,}" for n in counts)


def _percent(count: int, total: int) -> str:
    """Return a share that is 0 or 100 % only if it is exactly that."""
    if count in (0, total):
        return f"{100 if count else 0}\u202f%"
    sign = "&lt;" if 1000 * count < total else "&gt;" if 1000 * count > 999 * total else ""
    return f"{sign}{min(max(100 * count / total, 0.1), 99.9):.1f}\u202f%"


def _text(text: str) -> str:
    """Return text as HTML, with what neither HTML nor UTF-8 can have replaced."""
    kept = "".join(c if c.isprintable() or c in "\t\n" else "\ufffd" for c in text)
    return escape(kept)
