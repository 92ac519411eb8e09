"""Looks for known vulnerabilities in what is installed beside DMX, by pip-audit.

    .venv/bin/python .ci/audit.py

Ends with status 1 for a vulnerability that some newer version mends and everything installed would take; one
that cannot be mended yet is printed. Without a network nothing can be looked up: it says so, and ends with 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The first that answers. PyPI's mirrors often have packages alone.
SERVICES = ("pypi", "osv")
TIMEOUT_S = 15
# Longer than any answer: pip-audit asks for one package after the other, and tries again.
PATIENCE_S = 120
Ask = Callable[[str], dict[str, Any] | None]


@dataclass(frozen=True)
class Finding:
    """A known vulnerability of an installed package.

    Attributes:
        package, version: what is installed.
        name: of the vulnerability.
        fixes: versions that mend it; mends: the first of them that everything installed takes, if one is.
    """

    package: str
    version: str
    name: str
    fixes: tuple[str, ...]
    mends: str | None


def ask(service: str) -> dict[str, Any] | None:
    """What pip-audit finds by a service; None where it does not answer."""
    command = [
        *(sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--progress-spinner", "off"),
        *("--vulnerability-service", service, "--timeout", str(TIMEOUT_S), "--format", "json"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        return dict(json.loads(done.stdout))
    except (subprocess.TimeoutExpired, ValueError):
        return None


def audited(report: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The packages that a service knew, of a report."""
    return [each for each in (report or {}).get("dependencies", []) if "vulns" in each]


def findings(packages: Iterable[dict[str, Any]]) -> list[Finding]:
    """Every vulnerability, and whether it could be mended here."""
    found = []
    for package in packages:
        for each in package["vulns"]:
            fixes = tuple(each["fix_versions"])
            mends = next((fix for fix in fixes if is_taken(package["name"], fix)), None)
            found.append(Finding(package["name"], package["version"], each["id"], fixes, mends))
    return found


def is_taken(name: str, version: str) -> bool:
    """Whether all installed packages that want another would take a version of it."""
    for distribution in metadata.distributions():
        for line in distribution.requires or ():
            wanted = Requirement(line)
            applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            is_it = applies and canonicalize_name(wanted.name) == canonicalize_name(name)
            if is_it and not wanted.specifier.contains(version, prereleases=True):
                return False
    return True


def audit(services: Sequence[str] = SERVICES, ask: Ask = ask) -> int:
    """Ask, print what was found, and return the exit status."""
    for service in services:
        packages = audited(ask(service))
        if packages:
            break
        print(f"audit: the vulnerability service {service} told nothing about any package")
    else:
        print("audit: NOTHING WAS CHECKED: no vulnerability service could be reached (see above)")
        return 0
    found = findings(packages)
    for each in found:
        fixes = ", ".join(each.fixes) or "none"
        remedy = f"install {each.mends}" if each.mends else f"no fix that fits here ({fixes})"
        print(f"audit: {each.package} {each.version}: {each.name}: {remedy}")
    mendable = sum(each.mends is not None for each in found)
    print(
        f"audit: {len(packages)} packages looked up by {service}: {len(found)} vulnerabilities, of which "
        f"{mendable} can be mended"
    )
    return int(mendable > 0)


if __name__ == "__main__":
    sys.exit(audit())
