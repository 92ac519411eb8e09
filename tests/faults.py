"""Jobs across several hosts, and what may happen to them: a worker or a host killed, cut off, the head lost.

A job runs by `launch/hosts.sh`. It is struck once it has come so far; then
it ends by itself, or, where the head was struck, is run again with the hosts that are left.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from hosts import Host, wait_until
from jobs import Job

LAUNCH = Path(__file__).parents[1] / "launch" / "hosts.sh"
COMING_S = 240  # for a job to come so far that it is struck
ENDING_S = 400  # after which a job counts as hanging
FAULTS = ("worker killed", "host cut off", "host killed", "head killed")
HEAD_FAULTS = ("head killed",)


@dataclass
class Outcome:
    """How a job went.

    Attributes:
        total_s: from its start to its end, runs after a lost head included; in seconds.
        after_s: from the fault to the end.
        noticed_s: from the fault to the word of it, or to the end of the command that lost its head.
        said: what the command printed.
    """

    total_s: float = 0.0
    after_s: float = 0.0
    noticed_s: float = 0.0
    said: list[str] = field(default_factory=list)


def run_job(job: Job, hosts: list[Host], ssh: str, folder: Path, fault: str | None = None) -> Outcome:
    """Run a job across hosts, strike it once, and wait for its end.

    Args:
        job: what runs.
        hosts: the first is the head; the last computes nothing, the command is given there.
        ssh: the ssh command.
        folder: of logs and token.
        fault: one of FAULTS.

    Raises:
        TimeoutError: it does not come so far, or does not end.
        AssertionError: it ends with an error that it should have survived.
    """
    outcome, start = Outcome(), time.monotonic()
    process, log = _start(job, hosts, ssh, folder, "first")
    if fault is None:
        _end(process, log, outcome)
        outcome.total_s = time.monotonic() - start
        return outcome
    wait_until(lambda: job.progress() >= job.strike_at, COMING_S, f"{job.name} to come so far", process)
    struck = strike(fault, job, hosts)
    at = time.monotonic()
    if fault in HEAD_FAULTS:
        status = process.wait(ENDING_S)
        outcome.noticed_s = time.monotonic() - at
        outcome.said.append(log.read_text())
        assert status not in (0, None), (
            f"the command did not notice that its head was gone:\n{log.read_text()}"
        )
        process, log = _start(job, [host for host in hosts if host is not struck], ssh, folder, "second")
    elif job.word is not None:
        word = job.word
        wait_until(lambda: word in log.read_text(), ENDING_S, "word of the fault", process)
        outcome.noticed_s = time.monotonic() - at
    elif job.may_end and process.wait(ENDING_S):
        outcome.noticed_s = time.monotonic() - at
        outcome.said.append(log.read_text())
        process, log = _start(job, [host for host in hosts if host is not struck], ssh, folder, "second")
    _end(process, log, outcome)
    outcome.after_s = time.monotonic() - at
    outcome.total_s = time.monotonic() - start
    return outcome


def strike(fault: str, job: Job, hosts: list[Host]) -> Host:
    """Let it happen; returns the host that it happened to."""
    if fault == "head killed":
        hosts[0].kill()
        return hosts[0]
    # Not the head's: that is another fault.
    host = next(host for host in hosts[1:-1] if workers_on(host, job))
    if fault == "worker killed":
        os.kill(workers_on(host, job)[0], signal.SIGKILL)
    elif fault == "host killed":
        host.kill()
    else:
        host.cut_off()
    return host


def workers_on(host: Host, job: Job) -> list[int]:
    """Process ids of the job's workers on a host."""
    return [pid for pid, words in host.processes().items() if job.workers in words]


def settings(ssh: str, folder: Path) -> dict[str, str]:
    """Settings of the scripts for hosts that share this machine's cores; the token lies in `folder`."""
    return {
        "DMX_SSH": ssh,
        "DMX_BIN": str(Path(sys.executable).parent),
        "DMX_CPUS": "1",
        "DMX_OBJECT_STORE_BYTES": "100000000",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
    }


def _start(
    job: Job, hosts: list[Host], ssh: str, folder: Path, name: str
) -> tuple[subprocess.Popen[str], Path]:
    logs = folder / name
    logs.mkdir(parents=True)
    environment = settings(ssh, folder) | {"DMX_LOGS": str(logs)}
    log = logs / "command.log"
    with open(log, "w") as output:
        command = [LAUNCH, *(host.name for host in hosts[:-1]), "--", *job.words]
        process = hosts[-1].start(
            *command, environment=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
        )
    return process, log


def _end(process: subprocess.Popen[str], log: Path, outcome: Outcome) -> None:
    status = process.wait(ENDING_S)
    outcome.said.append(log.read_text())
    assert status == 0, log.read_text()[-4000:]
