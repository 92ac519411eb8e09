"""HTML pages that hold all that they show: escaped text, pictures as data, no network."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
from collections.abc import Sequence

from dmx.names import printable

PAGES = (".html", ".htm")


def opening(title: str, *, css: str = "", script: str = "") -> str:
    """A page's beginning, up to its heading.

    Args:
        title: of the page.
        css: what it adds to the styles of all pages.
        script: what runs in it; nothing else does, whatever a file name holds.
    """
    styles = resource("dmx", "page.css") + css
    code = f"<script>{script}</script>\n" if script else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{text(title)}</title>
<style>
{styles}</style>
{code}</head>
<body>
<h1>{text(title)}</h1>
"""


CLOSING = "</body>\n</html>\n"


def _policy(script: str) -> str:
    """Nothing but the page's own pictures, styles and this script: browsers run and fetch nothing else."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    return policy


def resource(package: str, name: str) -> str:
    """A text file that comes with a package."""
    return (importlib.resources.files(package) / name).read_text(encoding="utf-8")


def text(shown: str) -> str:
    """Text as HTML shows it, whatever is in it."""
    return html.escape(printable(shown))


def framed(uris: Sequence[str | None], alt: str) -> str:
    """Pictures in one frame, side by side; or word that there is none.

    Args:
        uris: of the pictures; None where one cannot be had.
        alt: what they show, for those who do not see them.
    """
    pictures = "".join(f'<img src="{uri}" alt="{text(alt)}">' for uri in uris if uri is not None)
    return f'<div class="frame">{pictures or "<span class=none>no picture</span>"}</div>'
