"""Settings and versions of a run: what differs from the defaults first."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import yaml

from dmx.config import Config, differences, to_tree
from dmx.page import text
from dmx.report.curves import missing
from dmx.report.record import RunRecord
from dmx.train.provenance import machine_versions
from dmx.train.runlog import versions


def settings(run: RunRecord) -> str:
    """Two tables, and the whole configuration folded up."""
    changed = differences(Config(), run.config)
    rows = "".join(
        f"<tr><td><code>{text(name)}</code><td>{text(_yaml(new))}<td>{text(_yaml(old))}\n"
        for name, (old, new) in changed.items()
    )
    whole = yaml.safe_dump(to_tree(run.config), sort_keys=False)
    branch = ""
    if run.origin is not None:
        branch = (
            f"<p>The run branched from {text(str(run.origin.get('run')))} after "
            f"{text(str(run.origin.get('epochs')))} epochs.</p>\n"
        )
    lines = "\n".join(text(line) for line in whole.splitlines())
    return (
        f"{branch}<div class=wide><table><tr><th>setting<th>of this run<th>default\n{rows}</table></div>\n"
        f"<details><summary>All settings</summary><pre>{lines}</pre></details>\n{_versions(run)}"
    )


def _versions(run: RunRecord) -> str:
    if not run.versions:
        return missing("No versions: the run folder has no starts.jsonl.")
    now = versions() | machine_versions()
    rows = "".join(
        f"<tr><td>{text(name)}<td>{text(str(version))}"
        f"<td>{'' if now.get(name) == version else text(str(now.get(name, 'not looked at')))}\n"
        for name, version in run.versions.items()
    )
    dmx = text(importlib.metadata.version("dmx"))
    return (
        f"<table><tr><th>version<th>of training<th>of this report, if other\n{rows}</table>\n"
        f"<p>page by dmx {dmx}</p>\n"
    )


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
