"""Follows every link of the built pages, without the network: `python docs/links.py build/docs`.

Says what leads nowhere, and what a page would load from elsewhere, which none may; lists links to elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes by which a page loads something, and those by which it leads somewhere.
LOADS = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "srcset")}
LEADS = {("a", "href")}


@dataclass
class Page(HTMLParser):
    """What a page loads, where it leads, and the places in it."""

    loads: list[str] = field(default_factory=list)
    leads: list[str] = field(default_factory=list)
    places: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element loads, where it leads and its name, as HTMLParser finds it."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id":
                self.places.add(value)
            elif (tag, name) in LOADS:
                self.loads.append(value)
            elif (tag, name) in LEADS:
                self.leads.append(value)


def read(site: Path) -> dict[Path, Page]:
    """Every page of a site."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        page = pages[path.resolve()] = Page()
        page.feed(path.read_text(encoding="utf-8"))
    return pages


def is_elsewhere(link: str) -> bool:
    parts = urlsplit(link)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def broken(pages: dict[Path, Page]) -> Iterator[str]:
    """A sentence for every link that leads nowhere, and for what is loaded from elsewhere."""
    for path, page in pages.items():
        for link in page.loads:
            if is_elsewhere(link):
                yield f"{path.name}: loads {link}: pages load nothing from elsewhere"
        for link in page.loads + page.leads:
            parts = urlsplit(link)
            if is_elsewhere(link) or parts.scheme == "data":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{path.name}: {link}: no such file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                yield f"{path.name}: {link}: no such place in {target.name}"


def elsewhere(pages: dict[Path, Page]) -> list[str]:
    """Links to other sites, each once."""
    return sorted({link for page in pages.values() for link in page.leads if is_elsewhere(link)})


def main(site: str) -> int:
    pages = read(Path(site))
    print("links to elsewhere, not followed:", *elsewhere(pages), sep="\n  ")
    wrong = list(broken(pages))
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong or not pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
