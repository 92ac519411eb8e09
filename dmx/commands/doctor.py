"""Say what this machine has, whether what DMX needs works on it, and what to install.

Prints the machine (cores, memory, GPUs, driver, CUDA), the packages with their versions, room on the disk and
in shared memory, and the kernels: every public operation is run on a small fixed input, on the CPU and on
every GPU that torch can use, and compared with its reference. Times are those of a call that compiles
nothing. Every problem gets a line: what was wanted, what was found, what to do.

Whatever may break is tried in a process of its own, so that a package that raises, aborts or hangs is
reported like any other. Nothing is changed, and nothing goes to the network. Kernels that were never used
are compiled first, which takes the longest.

The exit status is 0 when everything that was tried works, and 1 when something that is installed does not, or
when a package is missing that DMX cannot do without. Packages that only some commands want may be missing.

  dmx doctor
  dmx doctor --json > doctor.json
"""

from __future__ import annotations

import argparse
import json
import sys

SUMMARY = "say what this machine has, what works on it and what to install"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--json", action="store_true", help="print the same as JSON, with more figures, for reports of faults"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds that the packages, and the kernels of a device, may take; what has not answered by "
        "then is reported (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Examine the machine and print the report; 1 when something does not work."""
    from dmx.doctor.examine import examine
    from dmx.errors import DmxError

    if not args.timeout > 0:
        raise DmxError(f"--timeout: wanted seconds, more than 0, found {args.timeout:g}")
    report = examine(args.timeout, _say)
    print(json.dumps(report.tree(), indent=2) if args.json else report.text())
    return 0 if report.works else 1


def _say(what: str) -> None:
    """Progress, apart from the report."""
    print(f"dmx doctor: {what}", file=sys.stderr, flush=True)
