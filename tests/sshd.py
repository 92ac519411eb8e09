"""An ssh server on every host of `hosts`, and the ssh command that is let in."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hosts import Host, wait_until

SERVER = "/usr/sbin/sshd"
STARTING_S = 20


def why_not() -> str | None:
    """Why there is no ssh here; None when there is."""
    if shutil.which("ssh") is None or not Path(SERVER).exists():
        return "plain hosts want ssh and sshd (Debian: openssh-client, openssh-server)"
    return None


@contextlib.contextmanager
def ssh_servers(hosts: list[Host], folder: Path) -> Iterator[str]:
    """Serve ssh on every host to whoever has the key of the yielded ssh command."""
    key, server_key = folder / "key", folder / "server_key"
    for path in (key, server_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # Where sshd shuts in whoever has not logged in yet.
    client = folder / "ssh_config"
    client.write_text(
        f"User root\nIdentityFile {key}\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        f"UserKnownHostsFile {folder / 'known_hosts'}\nLogLevel ERROR\n"
    )
    with contextlib.ExitStack() as stack:
        for host in hosts:
            config = host.folder / "sshd_config"
            config.write_text(
                f"ListenAddress {host.address}\nHostKey {server_key}\nAuthorizedKeysFile {key}.pub\n"
                "PasswordAuthentication no\nPermitRootLogin prohibit-password\nStrictModes no\n"
                f"PidFile none\nUsePAM yes\nSetEnv TMPDIR={host.folder}\n"
            )
            log = stack.enter_context(open(host.folder / "sshd.log", "w"))
            host.start(SERVER, "-D", "-e", "-f", config, stdout=log, stderr=log)
        for host in hosts:
            wait_until(lambda host=host: _serves(host), STARTING_S, f"sshd on {host.name}")
        yield f"ssh -F {client}"


def _serves(host: Host) -> bool:
    probe = f"exec 3<>/dev/tcp/{host.address}/22"
    with contextlib.suppress(subprocess.TimeoutExpired, socket.error):
        return host.run("bash", "-c", probe, timeout_s=5).returncode == 0
    return False
