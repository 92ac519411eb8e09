"""A headless browser that looks at pages."""

from __future__ import annotations

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
