"""The page around its parts: one file without a script and without anything from elsewhere.

Whatever comes from a run is escaped where it is written. Should that ever be forgotten, the page's own policy still
lets no script run and nothing be fetched.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from launcher.page.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_page(title: str, parts: Iterable[str]) -> str:
    """The whole document; ``parts`` are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_section(title: str, *inside: str, grid: bool = False) -> str:
    """A part of the page with a heading; "" if there is nothing in it. ``grid``: figures beside each other."""
    shown = [each for each in inside if each]
    body = "\n".join(shown)
    return f"<section><h2>{escape(title)}</h2>{f'<div class=grid>{body}</div>' if grid else body}</section>" * bool(
        shown
    )


def write_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, words: Sequence[int] = (0,)) -> str:
    """A table of plain text; the columns ``words`` are words, the others numbers."""
    kinds = ["" if column in words else " class=n" for column in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    lines = [
        "<tr>"
        + f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in rows
    ]
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def write_tiles(tiles: Iterable[tuple[str, str, str]]) -> str:
    """Figures to be seen first: (what, value, words below)."""
    shown = (
        f"<div><dt>{escape(what)}</dt><dd><b>{escape(value)}</b><span>{escape(words)}</span></dd></div>"
        for what, value, words in tiles
    )
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def write_facts(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values below each other."""
    shown = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{"".join(shown)}</dl>'


def write_text(text: str, kind: str = "") -> str:
    """A paragraph."""
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def write_verbatim(text: str, label: str) -> str:
    """Text as it is, with its lines."""
    return f'<pre tabindex="0" role="region" aria-label="{escape(label)}">{escape(text)}</pre>'


def write_fold(title: str, inside: str) -> str:
    """What is seen on demand; a printed page has only its title."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def write_picture(svg: bytes, words: str) -> str:
    """A file's picture, which is an image to the page: nothing in it runs, and it shares no name with anything."""
    data = base64.b64encode(svg).decode("ascii")
    return (
        f'<div class="wide picture" tabindex="0" role="region" aria-label="{escape(words)}">'
        f'<img alt="{escape(words)}" src="data:image/svg+xml;base64,{data}"></div>'
    )
