"What the pages of a built site point to, and which of it does not exist. Reads files only, never the network."
from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADS = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}


class Page(HTMLParser):
    "Anchors, links and loaded resources of one HTML file."

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value or "")
            elif (tag, name) == ("a", "href"):
                self.links.append(value or "")
            elif (tag, name) in _LOADS:
                self.loads.append(value or "")


def read(site: Path) -> dict[Path, Page]:
    "Every page below `site`."
    return {path.resolve(): Page(path) for path in site.rglob("*.html")}


def broken(site: Path, pages: dict[Path, Page]) -> list[str]:
    "Links and resources of the pages in `site` that lead nowhere inside it, one line each."
    return sorted({f"{path.relative_to(site.resolve())}: {target}"
                   for path, page in pages.items() for target in page.links + page.loads
                   if not _resolves(target, path, pages)})


def _resolves(target: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        return True
    goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    anchor = unquote(parts.fragment)
    return goal.is_file() and (not anchor or goal not in pages or anchor in pages[goal].anchors)


def remote(site: Path, pages: dict[Path, Page]) -> list[str]:
    "Resources that the pages and style sheets in `site` would fetch from a network, one line each."
    is_remote = re.compile(r"(?:https?:)?//").match
    found = [f"{path.relative_to(site.resolve())}: {load}" for path, page in pages.items()
             for load in page.loads if is_remote(load)]
    in_css = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)")
    return found + [f"{path.relative_to(site)}: {load}" for path in site.rglob("*.css")
                    for load in in_css.findall(path.read_text(encoding="utf-8"))]
