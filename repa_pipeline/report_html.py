"""Pieces of an HTML page: everything is escaped unless it is marked as HTML already."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from repa_pipeline.report_results import is_number

_MAX_PICTURE_SIDE = 1200
_MAX_LISTED = 20

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 24px 20px 60px; max-width: 1140px; background: #fff; color: #1d2126;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 10px; padding-bottom: 4px; border-bottom: 1px solid #d9dde2; }
h3 { font-size: 16px; margin: 22px 0 8px; }
p { margin: 6px 0; }
.quiet { color: #5b6570; font-size: 13px; }
.lead { padding: 10px 14px; background: #f2f6fa; border-left: 4px solid #0072b2; margin: 10px 0; }
.lead p:first-child { margin-top: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 6px 0; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0;
  border-bottom: 1px solid #e8ebee; }
th { font-weight: 600; color: #414a53; vertical-align: bottom; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.number .missing { white-space: normal; }
td code { color: #5b6570; }
.whole { white-space: nowrap; }
.name { min-width: 210px; overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; }
code { font: 12px ui-monospace, Menlo, Consolas, monospace; }
figure { margin: 8px 0; }
svg { width: 100%; height: auto; }
.set { display: grid; grid-template-columns: minmax(0, 460px) minmax(0, 1fr); gap: 22px;
  padding: 14px 0; border-bottom: 1px solid #e8ebee; }
.set h3 { margin-top: 0; }
.set img { max-width: 100%; height: auto; display: block; border: 1px solid #d9dde2; }
.missing { color: #8a5a00; }
details { margin: 6px 0; }
summary { cursor: pointer; color: #0b5c94; font-size: 14px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 2px 20px;
  font-size: 13px; margin: 6px 0; }
dl div { display: flex; gap: 8px; border-bottom: 1px solid #f0f2f4; }
dt { color: #5b6570; flex: 0 0 170px; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 760px) { .set { grid-template-columns: 1fr; } }
"""


class Html(str):
    """Text that is HTML already."""


def text(value: Any) -> str:
    """`value` as HTML: escaped, unless it is Html."""
    return value if isinstance(value, Html) else html.escape(str(value))


def key(colour: str, glyph: str) -> Html:
    """The mark by which a line of the charts is known, for a table."""
    return Html(f'<span style="color:{colour}">{text(glyph)}</span>')


def tag(name: str, content: Any, css: str = "") -> Html:
    """An element; `content` is escaped unless it is Html."""
    attribute = f' class="{css}"' if css else ""
    return Html(f"<{name}{attribute}>{text(content)}</{name}>")


def join(parts: Iterable[Any], between: str = "\n") -> Html:
    return Html(between.join(text(part) for part in parts))


def prose(words: str) -> Html:
    """Escaped words in which `commands` are set as code."""
    return Html(re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(words)))


def number(value: Any, form: str = ".4g", missing: str = "none") -> Html:
    """A number in short with the whole of it as its title; `missing` when it is none."""
    if not is_number(value):
        return missing_text(missing)
    return Html(f'<span title="{value!r}">{value:{form}}</span>')


def missing_text(words: str) -> Html:
    """Says that something is not there."""
    return tag("span", words, "missing")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Sequence[str]) -> Html:
    """A table; the columns named in `numeric` are set right, the first one has room for names."""
    kinds = ["number" if column in numeric else "" for column in columns]
    kinds[0] = "name"
    head = [tag("th", column, kind) for column, kind in zip(columns, kinds, strict=True)]
    lines = [tag("tr", join(head, ""))]
    for row in rows:
        cells = [tag("td", value, kind) for value, kind in zip(row, kinds, strict=True)]
        lines.append(tag("tr", join(cells, "")))
    return Html(f'<div class="wide"><table>\n{join(lines)}\n</table></div>')


def facts(values: Mapping[str, Any]) -> Html:
    """Names and values, nested ones under dotted names."""
    pairs = (Html(f"<div>{tag('dt', k)}{tag('dd', v)}</div>") for k, v in flat(values))
    return Html(f"<dl>\n{join(pairs)}\n</dl>")


def folded(summary: str, content: Any) -> Html:
    """Content that is shown on a click."""
    return Html(f"<details><summary>{text(summary)}</summary>\n{text(content)}\n</details>")


def picture(path: Path, alt: str) -> Html | None:
    """A PNG file as an <img> that holds its data, made smaller when large; None if unreadable."""
    return picture_of(path.read_bytes(), alt)


def picture_of(data: bytes, alt: str) -> Html | None:
    """The same of a file's bytes."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            if max(image.size) > _MAX_PICTURE_SIDE:
                image.thumbnail((_MAX_PICTURE_SIDE, _MAX_PICTURE_SIDE), Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, format="PNG")
                data = buffer.getvalue()
            width, height = image.size
    except (OSError, SyntaxError, ValueError):
        return None
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Html(f'<img alt="{text(alt)}" width="{width}" height="{height}" src="{source}">')


def page(title: str, sections: Iterable[Html]) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{text(title)}</h1>\n{join(sections)}\n</body>\n</html>\n"
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) of every value, sorted."""
    pairs: list[tuple[str, str]] = []
    for key in sorted(values):
        value = values[key]
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, _short(value)))
    return pairs


def _short(value: Any) -> str:
    """A JSON value; of a long list (a thousand class names) its length."""
    if not isinstance(value, list):
        return "none" if value is None else str(value)
    return ", ".join(map(str, value)) if len(value) <= _MAX_LISTED else f"{len(value):,} values"
