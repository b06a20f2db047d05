"""An HTML page as its elements, for tests."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "img", "input", "hr"}
SAFE_TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span", "b", "i", "table", "tbody",
    "tr", "th", "td", "pre", "mark", "details", "summary", "svg", "line", "text", "polyline", "circle", "rect",
}  # fmt: skip


@dataclass
class Element:
    """An element: its text includes that of the elements within."""

    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """All elements of a page in their order. Every element must be closed."""

    source: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[Element] = []
        self.feed(self.source)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data

    def all(self, tag: str) -> list[Element]:
        return [each for each in self.elements if each.tag == tag]

    def values(self) -> list[tuple[str, str]]:
        """Return the path in summary.json and the text of each element that shows a value of it."""
        return [(each.attributes["data-of"], each.text) for each in self.elements if "data-of" in each.attributes]

    def check_offline_and_inert(self) -> None:
        """Raise AssertionError if the page could run something or ask for something."""
        assert {each.tag for each in self.elements} <= SAFE_TAGS
        for each in self.elements:
            for name, value in each.attributes.items():
                assert not name.startswith("on") and name not in ("src", "href", "srcset", "action", "style"), name
                assert "url(" not in value
        [style] = self.all("style")
        assert "url(" not in style.text and "@import" not in style.text

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return the points of each curve in its own units, from the places that are drawn."""
        found, chart = {}, {}
        for each in self.elements:
            if each.tag == "svg" and "data-x" in each.attributes:
                chart = each.attributes
            elif each.tag == "polyline":
                points = [tuple(map(float, pair.split(","))) for pair in each.attributes["points"].split()]
                found[each.attributes["data-series"]] = [_units(chart, *point) for point in points]
        return found


def _units(chart: dict[str, str], x: float, y: float) -> tuple[float, float]:
    """Return the iteration and the value at a place. The area of a chart is 48 to 386 wide, 10 to 196 high."""
    low, high = map(float, chart["data-x"].split())
    bottom, top = map(float, chart["data-y"].split())
    across, up = (x - 48) / (386 - 48), (196 - y) / (196 - 10)
    if chart["data-scale"] == "log":
        value = math.exp(math.log(bottom) + up * (math.log(top) - math.log(bottom)))
    else:
        value = bottom + up * (top - bottom)
    return low + across * (high - low), value


def value_at(document: Any, path: str) -> Any:
    """Return the value of a JSON document at `a.b.c`."""
    for name in path.split("."):
        document = document[name]
    return document


def is_shown(text: str, value: Any) -> bool:
    """Return True if the text shows the value of a JSON document; a number to at least two digits."""
    if isinstance(value, bool):
        return text == ("yes" if value else "no")
    if value is None or value == []:
        return text == "–"
    if isinstance(value, list):
        return text == ", ".join(map(str, value))
    if isinstance(value, (int, float)) and re.fullmatch(r"[-\d.,]+(e-?\d+)?", text):
        shown = float(text.replace(",", ""))
        return math.isclose(shown, value, rel_tol=5e-3, abs_tol=0.051 if "." in text else 0.51)
    return text == str(value)
