"""SLURM on the hosts of `hosts`: a controller on the first, a node on each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hosts import Host, wait_until

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
STARTING_S = 60
CONFIG = """
ClusterName=dmx
SlurmctldHost={head}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=30
MessageTimeout=30
InactiveLimit=0
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there is no SLURM here; None when there is."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    return f"SLURM wants {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else None


@contextlib.contextmanager
def slurm(hosts: list[Host], folder: Path) -> Iterator[dict[str, str]]:
    """Run SLURM on the hosts; yields the environment in which its commands find it."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cpus = os.cpu_count() or 1
    nodes = "\n".join(
        f"NodeName={host.name} NodeAddr={host.address} CPUs={cpus} RealMemory=1000 State=UNKNOWN"
        for host in hosts
    )
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(head=f"{hosts[0].name}({hosts[0].address})", folder=folder, nodes=nodes))
    environment = {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()
    for host in hosts:
        (folder / f"spool-{host.name}").mkdir()
    # One authority for all: its socket is a file, which they share.
    munge = [
        *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"),
        *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"),
        f"--seed-file={folder}/munged.seed",
    ]
    with open(folder / "daemons.log", "w") as log:
        hosts[0].start(*munge, environment=environment, stdout=log, stderr=log)
        hosts[0].start("slurmctld", "-D", environment=environment, stdout=log, stderr=log)
        for host in hosts:
            host.start("slurmd", "-D", "-N", host.name, environment=environment, stdout=log, stderr=log)
        count = str(len(hosts))
        wait_until(lambda: _idle(hosts[0], environment) == count, STARTING_S, f"{count} nodes of SLURM")
        yield environment


def _idle(host: Host, environment: dict[str, str]) -> str:
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return host.run(*command, environment=environment, timeout_s=20).stdout.strip()
    return ""
