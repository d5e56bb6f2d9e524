"""A page of a run as a test sees it: its words, its tables, its curves, and that nothing in it runs or is fetched."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "img"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """A page taken apart; it has to be closed as it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(self.words)
        svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
        self.svgs = [ElementTree.fromstring(svg) for svg in svgs]  # noqa: S314 (ours)
        self.titles = [title.text or "" for svg in self.svgs for title in svg.iter(f"{SVG}title")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data
        if self.open and self.open[-1] not in ("style", "title", "desc"):
            self.words.append(data.strip())

    def row(self, name: str) -> list[str]:
        """The cells of a table's row behind the one that says ``name``."""
        (found,) = [cells[1:] for cells in self.cells if cells[0] == name]
        return found

    def path(self, kind: str, chart: str) -> list[str]:
        """The ``d`` of the paths of a class in the chart of this title."""
        (svg,) = [svg for svg in self.svgs if (svg.findtext(f"{SVG}title") or "").startswith(chart)]
        return [path.get("d", "") for path in svg.iter(f"{SVG}path") if path.get("class") == kind]


def points(d: str) -> list[list[tuple[float, float]]]:
    """The pieces of a path, each of (x, y)."""
    pieces = [piece.removesuffix("h0") for piece in d.split("M") if piece]
    return [[(float(x), float(y)) for x, y in (each.split() for each in piece.split("L"))] for piece in pieces]


def check_closed(text: str) -> None:
    """Nothing runs, and nothing comes from elsewhere."""
    found = Page(text)
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {tag for tag, _ in found.tags}
    for tag, given in found.tags:
        assert not [name for name in given if name.startswith("on")], (tag, given)
        for name in ("src", "href", "srcset", "xlink:href", "action"):
            assert (given.get(name) or "data:").startswith("data:"), (tag, given)
    assert not re.search(r"@import|url\(\s*(?!['\"]?data:)", text)
    policy = next(given["content"] for _, given in found.tags if given.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src" not in policy
