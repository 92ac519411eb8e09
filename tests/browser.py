"""A headless browser that looks at pages."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

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


def asked_by_page(net_log: Path) -> set[str]:
    """Addresses on a network that a page asked for (--log-net-log); the browser's own have no origin."""
    events = json.loads(net_log.read_text(encoding="utf-8"))["events"]
    told = [event.get("params", {}) for event in events]
    return {
        params["url"]
        for params in told
        if params.get("initiator") == "null" and not params["url"].startswith(("file:", "data:"))
    }
