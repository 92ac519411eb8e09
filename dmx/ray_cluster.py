"""Ray: joining the cluster that RAY_ADDRESS names, or starting a private one on this host.

Wait for the hosts of a cluster that is starting:  python -m dmx.ray_cluster HOSTS SECONDS
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dmx import stopping
from dmx.cores import cores
from dmx.errors import DmxError
from dmx.guard import guarded
from dmx.loopback import gloo_on_loopback
from dmx.progress import say
from dmx.scratch import Process, await_ends, descendants, scratch_folder

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A thread that still asks for something while a command ends would start another cluster, in /tmp/ray.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray Train would print each line of a worker twice, and watch itself through a dashboard that is off.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Every pass over a split would leave a megabyte of metrics in Ray's processes, which nobody reads.
    "RAY_enable_metrics_collection": "0",
    # Nor does anybody read what became of every task, of which the head keeps the last hundred thousand.
    "RAY_task_events_report_interval_ms": "0",
    # A host that is about to go takes its workers with it at once: they start again elsewhere.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    # After one second without work Ray ends a worker that decodes, and soon starts another, whose imports
    # take seconds of the cores that compute.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    # By itself glibc has eight arenas for each core, over which what threads keep spreads, epoch by epoch.
    "MALLOC_ARENA_MAX": str(cores()),
}
# Told to stay on loopback, Ray takes an address that other hosts reach all the same, and listens there, but
# where this is off, as it is by itself on Windows and macOS.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
POLL_S = 0.5
CONNECT_S = 5.0
HEAD_POLL_S = 2.0
HEAD_S = 30.0


class _Groups(threading.local):
    """Whether processes that this thread starts get groups of their own."""

    apart = False


_groups = _Groups()
# Ray starts its processes with code of its own between fork and exec, for which Python runs this, too.
os.register_at_fork(after_in_child=lambda: os.setpgid(0, 0) if _groups.apart else None)


@contextmanager
def ray_cluster(cpus: int | None = None, object_store_bytes: int | None = None) -> Iterator[str]:
    """Be connected to a Ray cluster within it.

    With RAY_ADDRESS in the environment that cluster is joined, and the arguments do nothing. Without, a
    private one starts on this host and ends with it. It has no dashboard, listens on loopback alone, and asks
    for a token, which other users of this host have not.

    Args:
        cpus: cores that the private cluster shares out; None: all that this process may use.
        object_store_bytes: room for objects in shared memory; None: what Ray takes by itself.

    Yields:
        The address of the cluster's head.

    Raises:
        DmxError: Ray is not installed or does not start, or nothing answers at RAY_ADDRESS.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    is_private = not joins_cluster()
    own = _private_settings() if is_private else {}
    os.environ |= own  # Ray looks when it is imported
    try:
        import ray
    except ImportError as error:
        raise DmxError("this wants Ray: install dmx[cpu] or dmx[gpu]") from error

    def is_left() -> bool:
        """To the guard."""
        return is_private and stopping.is_ending()

    with ExitStack() as stack:
        if own:
            stack.callback(lambda: [os.environ.pop(name, None) for name in own])
        # The names of its sockets are short.
        scratch = stack.enter_context(scratch_folder("dmx-ray-", Path("/tmp"), is_left=is_left))
        if is_private:
            stack.enter_context(guarded(scratch))
        stack.callback(_shut_down, descendants(os.getpid()))
        if not is_private:
            _join(os.environ["RAY_ADDRESS"])
            stack.enter_context(_watching(ray.get_runtime_context().gcs_address))
        else:
            _start(cpus, object_store_bytes, scratch)
        yield ray.get_runtime_context().gcs_address


def _start(cpus: int | None, object_store_bytes: int | None, scratch: Path) -> None:
    """Start the private cluster; arguments as of `ray_cluster`, and where its files lie."""
    import ray

    try:
        # Ray would put in a handler that ends the process.
        with stopping.alone_with_signals(), _in_groups_of_their_own():
            ray.init(
                address="local",
                num_cpus=cpus or cores(),
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                _temp_dir=str(scratch),
                _node_ip_address="127.0.0.1",
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except Exception as error:  # Ray has no class of its own for it
        raise DmxError(
            f"Ray did not start on {os.uname().nodename}: one of its processes may have been ended, by "
            f"somebody or for want of memory; the same command tries again. What Ray says: {error}"
        ) from error


@contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Ray's processes that start within, and theirs, are not of this command's process group.

    A signal to the whole group is the command's to answer. It needs its Ray until it has: asked for anything
    once the raylet is gone, Ray's core ends the process with a status of its own.
    """
    _groups.apart = True
    try:
        yield
    finally:
        _groups.apart = False


def _shut_down(others: set[Process]) -> None:
    """Leave Ray, and wait for the processes that it started here, which would go on writing files.

    Not where this process was told to stop: threads may still ask Ray for something, which would end the
    process with another status. Its end is near, and ends a private Ray as well.

    Args:
        others: processes that were there before it.
    """
    import ray

    if stopping.is_ending():
        return
    with stopping.deferred():
        own = descendants(os.getpid()) - others
        ray.shutdown()
        await_ends(own)


@functools.cache
def _token() -> str:
    """This process's: Ray keeps the first that it sees."""
    return secrets.token_hex(32)


@functools.cache
def _imports_ray() -> bool:
    """Whether a private cluster imports Ray, and nobody did before; to be asked before it does."""
    return "ray" not in sys.modules


def _private_settings() -> dict[str, str]:
    """Variables that keep others out of a private cluster; none that the user has set.

    None either where Ray was imported without them, which is said: it would heed some and not others, and not
    show the token to its own cluster.
    """
    is_told = "RAY_AUTH_MODE" in os.environ
    if not _imports_ray():
        if not is_told:
            say(
                "warning: Ray was imported before DMX started it: its cluster asks for no token, and whoever "
                "reaches this host's ports can run code in it. Import ray only once dmx.ray_cluster has "
                "started it, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before Python starts"
            )
        return {}
    token = {} if is_told else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    own = LOOPBACK | gloo_on_loopback() | token
    return {name: value for name, value in own.items() if name not in os.environ}


@contextmanager
def _watching(address: str) -> Iterator[None]:
    """End this process with a word when the head is silent for HEAD_S seconds.

    Ray's calls do not return then, and after a minute its own code ends the process without one.
    """
    done = threading.Event()

    def watch() -> None:
        last_heard = time.monotonic()
        while not done.wait(HEAD_POLL_S):
            now = time.monotonic()
            if answers(address):
                last_heard = now
            elif now - last_heard > HEAD_S and not done.is_set():
                sys.stderr.write(
                    f"error: {os.uname().nodename} waited {HEAD_S:.0f} s for the head of the Ray cluster at "
                    f"{address}, which does not answer: once it is back, or with RAY_ADDRESS naming another, "
                    "run the same command again, which goes on from the last checkpoint or part\n"
                )
                sys.stderr.flush()
                os._exit(2)

    thread = threading.Thread(target=watch, name="watch-head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(2 * CONNECT_S)


def joins_cluster() -> bool:
    """Whether there is a cluster to join: RAY_ADDRESS is set."""
    return bool(os.environ.get("RAY_ADDRESS"))


def await_hosts(count: int, timeout_s: float) -> None:
    """Wait until the cluster at RAY_ADDRESS has `count` hosts.

    Raises:
        DmxError: it does not within `timeout_s` seconds, naming the hosts that came.
    """
    if not joins_cluster():
        raise DmxError("RAY_ADDRESS: wanted the address of a Ray cluster, found none set")
    deadline = time.monotonic() + timeout_s
    while not answers(os.environ["RAY_ADDRESS"]):
        if time.monotonic() > deadline:
            raise DmxError(
                f"{os.uname().nodename} waited {timeout_s:.0f} s for the head of the Ray cluster at "
                f"{os.environ['RAY_ADDRESS']}, which does not answer: look at the log of its start"
            )
        time.sleep(POLL_S)
    with ray_cluster():
        while len(names := host_resources()) < count:
            if time.monotonic() > deadline:
                raise DmxError(
                    f"{os.uname().nodename} waited {timeout_s:.0f} s for {count} hosts, found {len(names)}: "
                    f"{', '.join(names)}; look at the logs of the others' start"
                )
            time.sleep(POLL_S)


def host_resources() -> dict[str, dict[str, float]]:
    """What the hosts of the cluster have that this process is connected to (CPU, GPU), by their name."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    named = {f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": node for node in nodes}
    return {name: dict(named[name]["Resources"]) for name in sorted(named)}


def answers(address: str, timeout_s: float = CONNECT_S) -> bool:
    """Whether something takes connections at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout_s).close()
    except OSError:
        return False
    return True


def _join(address: str) -> None:
    import ray

    try:
        with stopping.alone_with_signals():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DmxError(
            f"RAY_ADDRESS: wanted a Ray cluster at {address}, found: {error}. Start one (see launch/), "
            "or unset RAY_ADDRESS to work on this host alone"
        ) from error


def main() -> None:
    """Entry for the scripts of launch/."""
    count, timeout_s = sys.argv[1:]
    try:
        await_hosts(int(count), float(timeout_s))
    except DmxError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
