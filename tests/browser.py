"""A headless browser that looks at pages."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def chromium() -> str:
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    if not any(found):
        pytest.skip("needs Chromium to look at the page, found none")
    return next(path for path in found if path)


def look(page: Path, tmp_path: Path, width: int, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a headless browser on a page, which must not need a network."""
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900", *more,
        page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


# A headless window is never narrower than 500 pixels; a frame is what a phone is.
FRAME = """<body><iframe src="measured.html" width="{}" height="900"></iframe>
<script>onmessage = event => document.body.textContent = event.data</script></body>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n?')


def measured(page: Path, tmp_path: Path, width: int, script: str, *more: str) -> dict[str, Any]:
    """What a script finds on a page that is `width` pixels wide.

    The page's own policy, which would not let it run, is taken out.

    Args:
        script: its `told` is what is given back.
    """
    text, policies = POLICY.subn("", page.read_text(encoding="utf-8"))
    assert policies == 1
    answer = 'parent.postMessage(JSON.stringify(told), "*")'
    asking = f"<script>onload = () => {{ {script}\n{answer} }}</script></body>"
    (tmp_path / "measured.html").write_text(text.replace("</body>", asking), encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.format(width), encoding="utf-8")
    shown = look(tmp_path / "frame.html", tmp_path, 1600, *more, "--dump-dom", "--virtual-time-budget=9000")
    body = re.search(r"<body[^>]*>(.*)</body>", shown.stdout, re.DOTALL)
    assert body is not None, shown.stdout
    told: dict[str, Any] = json.loads(html.unescape(body[1]))
    assert told.pop("width") == width
    return told


def asked_by_page(net_log: Path) -> set[str]:
    """Addresses on a network that a page asked for (--log-net-log); the browser's own have no origin."""
    events = json.loads(net_log.read_text(encoding="utf-8"))["events"]
    told = [event.get("params", {}) for event in events]
    return {
        params["url"]
        for params in told
        if params.get("initiator") == "null" and not params["url"].startswith(("file:", "data:"))
    }
