"""Several hosts on one machine: Linux network namespaces, each with an `eth0` on one switch, and a name.

What runs on a host sees its network alone, so that a host can be cut off (its link goes down) or killed (all
of its processes at once). Processes, files and memory are the machine's: end processes by `Host.kill`, never
by what looks for them by name (`ray stop`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

INTERFACE = "eth0"
NETWORK = "10.77.0"
ENDING_S = 20


def why_not() -> str | None:
    """Why this machine cannot play several hosts; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces want root"
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"network namespaces want {' and '.join(missing)} (Debian: iproute2, util-linux)"
    probe = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"this machine makes no network namespaces: {probe.stderr.strip()}"
    return None


@dataclass(frozen=True)
class Host:
    """One host: its name, the namespace that it is, its private address and a folder of its own."""

    name: str
    namespace: str
    address: str
    folder: Path
    environment: Mapping[str, str]

    def command(self, *words: str | Path) -> list[str]:
        """What runs `words` on this host, under its name."""
        named = 'hostname "$0" && exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "bash", "-c", named, self.name]
        return [*inside, *map(str, words)]

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
            self.command(*words),
            env={**self.environment, **(environment or {})},
            text=True,
            capture_output=True,
            check=False,
            timeout=timeout_s,
        )

    def processes(self) -> dict[int, str]:
        """Command lines of everything that runs on this host, by process id."""
        found = {}
        for pid in _ip("netns", "pids", self.namespace).split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                found[int(pid)] = words.decode(errors="replace").strip()
        return found

    def kill(self) -> None:
        """End all processes of this host at once, as a failing power supply does."""
        deadline = time.monotonic() + ENDING_S
        while pids := _ip("netns", "pids", self.namespace).split():
            # All stop before any ends: the last must not see the others end, and say goodbye to other hosts.
            for what in (signal.SIGSTOP, signal.SIGKILL):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), what)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: processes do not end: {self.processes()}")
            time.sleep(0.02)

    def cut_off(self) -> None:
        """Take the link down: the host runs on, and nobody reaches it."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def reconnect(self) -> None:
        """Take the link up again."""
        _ip("-n", self.namespace, "link", "set", INTERFACE, "up")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """That many hosts, named node1, node2 and so on, which reach each other by name; gone afterwards."""
    run = f"dmx{os.getpid()}{secrets.token_hex(2)}"
    folder = Path(tempfile.mkdtemp(prefix="dmx-", dir="/tmp"))  # Sockets in it need a short path.
    made: list[Host] = []
    namespaces = [f"{run}-switch", *(f"{run}-{number}" for number in range(1, count + 1))]
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        switch = namespaces[0]
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, namespace in enumerate(namespaces[1:], 1):
            made.append(_join(switch, namespace, number, folder))
        _name(made)
        yield made
    finally:
        for host in made:
            host.kill()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _join(switch: str, namespace: str, number: int, folder: Path) -> Host:
    port, address, own = f"port{number}", f"{NETWORK}.{number}", folder / str(number)
    own.mkdir()
    ends = ["link", "add", INTERFACE, "netns", namespace, "type", "veth"]
    _ip(*ends, "peer", "name", port, "netns", switch)
    _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
    _ip("-n", namespace, "link", "set", INTERFACE, "up")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": INTERFACE, "TMPDIR": str(own)}
    for name in ("RAY_ADDRESS", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return Host(f"node{number}", namespace, address, own, environment)


def _name(made: list[Host]) -> None:
    """Files that `ip netns exec` puts in the place of those in /etc: all names, and no server to ask."""
    names = "".join(f"{host.address} {host.name}\n" for host in made)
    for host in made:
        etc = Path("/etc/netns") / host.namespace
        etc.mkdir(parents=True)
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (etc / "resolv.conf").write_text("")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def wait_until(check: Any, timeout_s: float, what: str, process: subprocess.Popen[Any] | None = None) -> None:
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


def log_file(path: Path) -> IO[str]:
    """A file for a command's output."""
    return open(path, "w", encoding="utf-8")
