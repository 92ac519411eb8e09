"""What is said when a Ray cluster does not answer. Clusters that do are those of tests/integration."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dmx.cores import cores
from dmx.errors import DmxError
from dmx.guard import users_of
from dmx.ray_cluster import await_hosts, joins_cluster

# A head that goes away: something that listens, and then does not.
LOST_HEAD = """
import socket, time
from dmx import ray_cluster
ray_cluster.HEAD_S, ray_cluster.HEAD_POLL_S = 1.0, 0.1
head = socket.create_server(("127.0.0.1", 0))
with ray_cluster._watching("127.0.0.1:%d" % head.getsockname()[1]):
    time.sleep(2)
    print("still here", flush=True)
    head.close()
    time.sleep(60)
"""


def test_a_lost_head_ends_the_command_with_a_word() -> None:
    """A call of Ray would wait on; the process ends, with the status of what a user can mend."""
    done = subprocess.run([sys.executable, "-c", LOST_HEAD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == "still here\n"
    assert (
        f"error: {os.uname().nodename} waited 1 s for the head of the Ray cluster at 127.0.0.1" in done.stderr
    )
    assert "run the same command again" in done.stderr


def test_waiting_for_hosts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 discards, and nothing listens there."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(DmxError, match=r"waited 1 s for the head of the Ray cluster at 127\.0\.0\.1:9"):
        await_hosts(2, 1.0)
    monkeypatch.delenv("RAY_ADDRESS")
    assert not joins_cluster()
    with pytest.raises(DmxError, match="RAY_ADDRESS: wanted the address of a Ray cluster, found none set"):
        await_hosts(2, 1.0)


def test_a_cluster_that_does_not_start_is_an_error() -> None:
    """As where one of its processes is ended for want of memory."""
    code = (
        "import psutil, threading, time\n"
        "from dmx.errors import DmxError\n"
        "from dmx.ray_cluster import ray_cluster\n"
        "def end():\n"
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "        for child in psutil.Process().children():\n"
        "            if child.name() == 'raylet': child.kill()\n"
        "threading.Thread(target=end, daemon=True).start()\n"
        "try:\n"
        "    with ray_cluster(1): pass\n"
        "except DmxError as error: print(error)"
    )
    environment = os.environ | {"RAY_raylet_start_wait_time_s": "3"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(
        f"Ray did not start on {os.uname().nodename}: one of its processes may have"
    )
    assert "the same command tries again. What Ray says: The current node timed out" in done.stdout


def test_workers_have_an_arena_for_each_core_and_gloo_on_loopback_unless_told_otherwise() -> None:
    """By itself glibc has eight times as many, and training grows for as long as they fill."""
    names = ("MALLOC_ARENA_MAX", "GLOO_SOCKET_IFNAME")
    code = (
        "import os\n"
        "from dmx.ray_cluster import ray_cluster\n"
        "with ray_cluster(1):\n"
        "    import ray\n"
        f"    print(*ray.get(ray.remote(lambda: [os.environ[name] for name in {names}]).remote()))"
    )
    own = {name: value for name, value in os.environ.items() if name not in names}
    told = {"MALLOC_ARENA_MAX": "7", "GLOO_SOCKET_IFNAME": "eth7"}
    for environment, wanted in ((own, f"{cores()} lo"), (own | told, "7 eth7")):
        command = [sys.executable, "-c", code]
        said = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=120
        )
        assert said.stdout == f"{wanted}\n"


def test_nobody_starts_a_cluster_behind_its_end(tmp_path: Path) -> None:
    """As a thread would that still waits for results when the command is stopped."""
    code = (
        "from dmx.ray_cluster import ray_cluster\n"
        "with ray_cluster(1): import ray\n"
        "try: ray.put(1)\n"
        "except ray.exceptions.RaySystemError: print('refused')"
    )
    command = [sys.executable, "-c", code]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    assert said.stdout == "refused\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_cluster_whose_command_is_killed() -> None:
    """By itself Ray has agents that look for their cluster for a minute."""
    code = (
        "import time\n"
        "from dmx.ray_cluster import ray_cluster\n"
        "with ray_cluster(1):\n"
        "    import ray\n"
        "    print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)\n"
        "    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        folder = command.stdout.readline().strip()
        assert Path(folder).name.startswith("dmx-ray-")
        deadline = time.monotonic() + 30
        while len(users_of(folder)) < 6:  # head, raylet, agents, monitor, the command
            assert time.monotonic() < deadline, users_of(folder)
            time.sleep(0.1)
        command.kill()
    deadline = time.monotonic() + 20
    while users_of(folder) or Path(folder).exists():
        assert time.monotonic() < deadline, users_of(folder)
        time.sleep(0.1)


def test_a_signal_to_the_group_of_a_command_is_not_for_its_ray() -> None:
    """Which has to be there until the command has answered."""
    code = (
        "import os, psutil\n"
        "from dmx.ray_cluster import ray_cluster\n"
        "with ray_cluster(1):\n"
        "    others = psutil.Process().children(recursive=True)\n"
        "    print(len(others) > 5, sum(os.getpgid(p.pid) == os.getpgid(0) for p in others))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    assert done.stdout == b"True 0\n"


@pytest.mark.parametrize(
    ("environment", "is_said"),
    [({}, True), ({"RAY_AUTH_MODE": "disabled"}, False)],
    ids=["by default", "told"],
)
def test_a_ray_that_was_there_before_is_said_to_be_open(environment: dict[str, str], is_said: bool) -> None:
    """It would not show a token that it did not find when it was imported."""
    code = (
        "import sys, types\n"
        "sys.modules['ray'] = types.ModuleType('ray')\n"
        "from dmx import ray_cluster\n"
        "print(ray_cluster._private_settings())"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", code]
    said = subprocess.run(
        command, env=own | environment, check=True, capture_output=True, text=True, timeout=120
    )
    assert said.stdout == "{}\n"
    lines = [line for line in said.stderr.splitlines() if line.startswith("warning: Ray was imported before")]
    assert len(lines) == is_said
    assert all("set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in line for line in lines)


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_command_that_is_stopped_ends_in_order_though_threads_use_ray(whole_group: bool) -> None:
    """Who asks Ray for something that was shut down, or is gone, is ended by it, with a status of its own."""
    code = (
        "import os, signal, threading, time\n"
        "from dmx import stopping\n"
        "from dmx.ray_cluster import ray_cluster\n"
        "def use():\n"
        "    make = ray.remote(lambda: bytes(10**6))\n"
        "    while True: ray.get([make.remote(), ray.put(bytes(10**6))])\n"
        "try:\n"
        "    with stopping.listening(lambda: 'test'), ray_cluster(1):\n"
        "        import ray\n"
        "        print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)\n"
        "        for _ in range(3): threading.Thread(target=use, daemon=True).start()\n"
        "        time.sleep(0.5)\n"
        f"        os.{'killpg' if whole_group else 'kill'}(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "except stopping.Stopped:\n"
        "    time.sleep(0.5)\n"
        "    stopping.end(stopping.status())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.returncode == 143
    assert "Traceback" not in done.stderr
    assert "The process will exit" not in done.stderr
    folder = done.stdout.strip()
    deadline = time.monotonic() + 20
    while users_of(folder) or Path(folder).exists():
        assert time.monotonic() < deadline, users_of(folder)
        time.sleep(0.1)
