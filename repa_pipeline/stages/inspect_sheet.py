"""A contact sheet: cells of equal tiles side by side with two lines of text beneath each."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
SMALLEST_TILE, LARGEST_TILE = 128, 192
_SHEET_WIDTH = 1900
_MARGIN, _GAP, _CELL_GAP = 16, 4, 18
_LINE, _FONT_SIZE, _TITLE_SIZE = 19, 14, 18
_INK, _QUIET = (29, 33, 38), (91, 101, 112)


@dataclasses.dataclass(frozen=True)
class Cell:
    """Tiles uint8 [R, R, 3] (any R) side by side, and the lines beneath."""

    tiles: tuple[Images, ...]
    lines: tuple[str, str]


def tile_side(resolution: int) -> int:
    """The side at which images of `resolution` pixels are shown: whole multiples of small ones."""
    if resolution < SMALLEST_TILE:
        return resolution * -(-SMALLEST_TILE // resolution)
    return min(resolution, LARGEST_TILE)


def contact_sheet(
    title: str, about: str, headings: Sequence[str], cells: Sequence[Cell], side: int
) -> Images:
    """The picture uint8 [H, W, 3]: `headings` name the tiles of a cell, above the top row."""
    from PIL import Image, ImageDraw

    width = len(headings) * side + (len(headings) - 1) * _GAP
    columns = max(1, min(len(cells), (_SHEET_WIDTH - 2 * _MARGIN) // (width + _CELL_GAP)))
    columns = _evened(len(cells), columns)
    top = _MARGIN + 26 + 2 * _LINE
    step = side + 2 * _LINE + _CELL_GAP
    inner = columns * width + (columns - 1) * _CELL_GAP
    longest = max(_font(_TITLE_SIZE).getlength(title), _font(_FONT_SIZE).getlength(about))
    size = (2 * _MARGIN + max(inner, int(longest) + 1), top + -(-len(cells) // columns) * step)
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, _INK, _font(_TITLE_SIZE))
    pen.text((_MARGIN, _MARGIN + 26), about, _QUIET, _font(_FONT_SIZE))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        left, upper = _MARGIN + column * (width + _CELL_GAP), top + row * step
        for place, tile in enumerate(cell.tiles):
            x = left + place * (side + _GAP)
            if row == 0:
                pen.text((x, upper - _LINE), _fitted(headings[place], side), _QUIET, _font())
            sheet.paste(Image.fromarray(_scaled(tile, side)), (x, upper))
        for line, text in enumerate(cell.lines):
            where = (left, upper + side + 2 + line * _LINE)
            pen.text(where, _fitted(text, width), _QUIET if line else _INK, _font())
    return np.asarray(sheet)


def _evened(count: int, most: int) -> int:
    """The fewest columns that need no more rows than `most` columns do."""
    rows = -(-count // most)
    return -(-count // rows)


def _scaled(tile: Images, side: int) -> Images:
    """A tile at `side` pixels: enlarged by repeating pixels, reduced with a filter."""
    from PIL import Image

    resampling = Image.Resampling.NEAREST if len(tile) <= side else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(tile).resize((side, side), resampling))


def _fitted(text: str, width: int) -> str:
    """The text if it fits, else its end behind dots (of a path the end tells files apart)."""
    font = _font()
    if font.getlength(text) <= width:
        return text
    starts = range(len(text) + 1)
    first = bisect.bisect_left(starts, -width, key=lambda i: -font.getlength("…" + text[i:]))
    return "…" + text[first:]


@functools.lru_cache(maxsize=4)
def _font(size: int = _FONT_SIZE) -> Any:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
