"""Several hosts on one machine: Linux namespaces, each with a name, an `eth0` on one switch, and processes.

What runs on a host sees its network and its processes alone, so that a host can be cut off (its link goes
down) or killed (all of its processes at once). Files are the machine's, as if all hosts mounted them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
NETWORK = "10.77.0"
ENDING_S = 20
NAMESPACES = ("--net", "--uts", "--pid", "--mount")
# The first process of a host: takes its name, and buries the children of others.
FIRST = 'mount --bind "$1" /etc/hosts && mount --bind /dev/null /etc/resolv.conf && hostname "$0" && echo up \
    && while :; do sleep 3600 & wait; done'


def why_not() -> str | None:
    """Why this machine cannot play several hosts; None when it can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces want root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"hosts made of namespaces want {' and '.join(missing)} (Debian: iproute2, util-linux)"
    make = ["unshare", *NAMESPACES, "--fork", "ip", "link", "add", INTERFACE, "type", "veth"]
    probe = subprocess.run(make, capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"this machine makes no namespaces with links: {probe.stderr.strip()}"
    return None


@dataclass(frozen=True)
class Host:
    """One host: its name, its first process, its private address and a folder of its own."""

    name: str
    first: int
    address: str
    folder: Path
    environment: Mapping[str, str]

    def command(self, *words: str | Path) -> list[str]:
        """What runs `words` on this host."""
        return ["nsenter", f"--target={self.first}", *NAMESPACES, "--wd=.", *map(str, words)]

    def start(
        self, *words: str | Path, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a command in a session of its own; options as for `Popen`."""
        return subprocess.Popen(
            self.command(*words),
            env={**self.environment, **(environment or {})},
            text=True,
            start_new_session=True,
            **options,
        )

    def run(
        self, *words: str | Path, timeout_s: float, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, its output captured."""
        return subprocess.run(
            self.command("timeout", "--kill-after=5", str(timeout_s), *words),
            env={**self.environment, **(environment or {})},
            text=True,
            capture_output=True,
            check=False,
            timeout=timeout_s + 10,
        )

    def processes(self) -> dict[int, str]:
        """Command lines of everything that runs on this host, by this machine's process id."""
        found = {}
        with contextlib.suppress(OSError):
            own = os.readlink(f"/proc/{self.first}/ns/pid")
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if words and os.readlink(folder / "ns/pid") == own:
                        found[int(folder.name)] = words.strip()
        return found

    def kill(self) -> None:
        """End this host for good, with all of its processes at once, as a failing power supply does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(
                self.first, signal.SIGKILL
            )  # The kernel kills the others, before they see each other end.
        wait_until(lambda: not self.processes(), ENDING_S, f"the processes of {self.name} to end")

    def cut_off(self) -> None:
        """Take the link down: the host runs on, and nobody reaches it."""
        _in(self.first, "ip", "link", "set", INTERFACE, "down")

    def reconnect(self) -> None:
        """Take the link up again."""
        _in(self.first, "ip", "link", "set", INTERFACE, "up")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """That many hosts, named node1, node2 and so on, which reach each other by name; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="dmx-", dir="/tmp"))  # Sockets in it need a short path.
    names = [f"node{number}" for number in range(1, count + 1)]
    addresses = [f"{NETWORK}.{number}" for number in range(1, count + 1)]
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n"
        + "".join(f"{address} {name}\n" for address, name in zip(addresses, names, strict=True))
    )
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        switch = stack.enter_context(_first_process("switch", folder / "hosts"))
        _in(switch, "ip", "link", "add", "bridge", "type", "bridge")
        _in(switch, "ip", "link", "set", "bridge", "up")
        made = []
        for name, address in zip(names, addresses, strict=True):
            first = stack.enter_context(_first_process(name, folder / "hosts"))
            _plug(switch, first, f"to-{name}", address)
            own = folder / name
            own.mkdir()
            made.append(Host(name, first, address, own, _environment(own)))
        yield made


@contextlib.contextmanager
def _first_process(name: str, names: Path) -> Iterator[int]:
    """New namespaces and the process that keeps them, which ends with all others in them."""
    command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    outer = subprocess.Popen(
        [*command, "bash", "-c", FIRST, name, str(names)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert outer.stdout is not None
        said = outer.stdout.readline()
        if said != "up\n":
            raise OSError(f"{name} does not start: {said}")
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        yield int(children[0])
    finally:
        outer.kill()  # Its child goes with it, and with that all others.
        outer.wait(ENDING_S)


def _plug(switch: int, first: int, port: str, address: str) -> None:
    ends = ["ip", "link", "add", INTERFACE, "netns", str(first), "type", "veth", "peer", "name", port]
    _run([*ends, "netns", str(switch)])
    _in(switch, "ip", "link", "set", port, "master", "bridge", "up")
    _in(first, "ip", "link", "set", "lo", "up")
    _in(first, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
    _in(first, "ip", "link", "set", INTERFACE, "up")


def _environment(folder: Path) -> dict[str, str]:
    own = {"GLOO_SOCKET_IFNAME": INTERFACE, "TMPDIR": str(folder)}
    others = ("RAY_ADDRESS", "MASTER_ADDR", "MASTER_PORT", "BASH_ENV")
    return {name: value for name, value in os.environ.items() if name not in others} | own


def _in(first: int, *words: str) -> None:
    _run(["nsenter", f"--target={first}", *NAMESPACES, *words])


def _run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def wait_until(
    check: Callable[[], object], timeout_s: float, what: str, process: subprocess.Popen[Any] | None = None
) -> None:
    """Wait for `check()` to hold.

    Raises:
        TimeoutError: it does not within the time, or the process that should bring it about ended.
    """
    deadline = time.monotonic() + timeout_s
    while not check():
        if process is not None and process.poll() is not None:
            raise TimeoutError(f"waited for {what}, and the process ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.02)
