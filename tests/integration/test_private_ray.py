"""A private Ray cluster lets nobody in who has not its token."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import ipaddress
import json
import os
import pkgutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

INSIDE = """
import os, subprocess, sys
from dmx.ray_cluster import ray_cluster
for turn in range(2):
    with ray_cluster(1, 100_000_000) as address:
        import ray
        print(ray.get(ray.remote(lambda: 'works').remote()), address)
        stranger = "import ray, sys; ray.init(sys.argv[1], logging_level=50); print('let in')"
        modes = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
        bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        strangers = [
            subprocess.Popen(
                [sys.executable, "-c", stranger, address], env=bare | mode, stdout=subprocess.PIPE, text=True,
                stderr=subprocess.DEVNULL,
            )
            for mode in ((), modes)[turn == 0]
        ]
        for each in strangers:
            said, _ = each.communicate()
            print(each.returncode, said.strip())
    assert not {"RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"} & os.environ.keys()
"""
# Where the processes of a private cluster listen, and how often.
DOORS = {
    **dict.fromkeys(("driver", "gcs_server", "ray::Actor", "ray::RuntimeEnvAgent"), 1),
    **dict.fromkeys(("raylet", "ray::DashboardAgent"), 2),
    **dict.fromkeys(("monitor.py", "dashboard.py"), 1),
}
# Pages of numbers for Prometheus, of autoscaling and of a dashboard, of which there is neither: Ray serves
# them without a token, and has no switch for them. They take nothing in: POST is not allowed.
PAGES = [(name, {"statuses": [200, 405, 405, 405]}) for name in ("monitor.py", "dashboard.py")]
# Or another cluster's would keep them from their ports, which are the same for all.
FREE_PORTS = {"AUTOSCALER_METRIC_PORT": "0", "DASHBOARD_METRIC_PORT": "0"}
# The last two are what the agents are for.
REQUESTS = (
    ("GET", "/"),
    *(("POST", path) for path in ("/", "/api/job_agent/jobs/", "/get_or_create_runtime_env")),
)
START_S, ANSWER_S = 60, 20


def test_a_stranger_is_not_let_in() -> None:
    """Neither without a token nor with another; the cluster's own work goes on, and so does a second one."""
    done = subprocess.run(
        [sys.executable, "-c", INSIDE], capture_output=True, text=True, check=False, timeout=300, env=_bare()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, without, wrong, second = done.stdout.splitlines()
    assert first.startswith("works 127.0.0.1:")
    assert without == "1 "
    assert wrong == "1 "
    assert second.startswith("works ")


def test_no_door_is_open() -> None:
    """All of a private cluster listens on loopback alone; there, every method of Ray asks for the token."""
    answers = _answers_to_a_stranger({})
    assert [door for door in answers if not ipaddress.ip_address(door[1]).is_loopback] == []
    assert [door for door in answers if not _is_shut(door[-1]) and (door[0], door[-1]) not in PAGES] == []


def test_a_stranger_finds_doors_that_are_open() -> None:
    """What the test above could not see, it could not rule out: here nobody asks for a token."""
    answers = _answers_to_a_stranger({"RAY_AUTH_MODE": "disabled"})
    assert [door for door in answers if _is_shut(door[-1])] == []


def _bare() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def _answers_to_a_stranger(environment: dict[str, str]) -> list[tuple[str, str, int, Any]]:
    """Process, address, port and answer, of all doors of a private cluster that one actor works in."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=300,
        env=_bare() | FREE_PORTS | environment,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    return [tuple(door) for door in json.loads(done.stdout)]


def _is_shut(answer: Any) -> bool:
    """Of HTTP, the statuses; of gRPC, how many methods refused, and the first that did not."""
    if "statuses" in answer:
        return set(answer["statuses"]) <= {401, 403}
    return answer["refused"] > 0 and answer["open"] is None


def _start_and_be_visited() -> None:
    """Start a private cluster, and somebody who has not its token, for all its doors."""
    from dmx.ray_cluster import ray_cluster

    with ray_cluster(1, 100_000_000):
        import ray

        class Actor:
            def works(self) -> bool:
                return True

        actor = ray.remote(Actor).remote()
        ray.get(actor.works.remote())
        found, deadline = _doors(), time.monotonic() + START_S
        while any(sum(door[0] == name for door in found) < count for name, count in DOORS.items()):
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
            found = _doors()
        subprocess.run([sys.executable, __file__, json.dumps(found)], env=_bare(), check=True)


def _doors() -> list[tuple[str, str, int]]:
    """Process, address and port, of all that listens in this process and below."""
    me = psutil.Process()
    return [
        (_name(process) if process != me else "driver", at.laddr.ip.removeprefix("::ffff:"), at.laddr.port)
        for process in (me, *me.children(recursive=True))
        for at in process.net_connections("tcp")
        if at.status == psutil.CONN_LISTEN
    ]


def _name(process: psutil.Process) -> str:
    scripts = [Path(word).name for word in process.cmdline() if word.endswith(".py")]
    return scripts[0] if scripts else process.name()


def _visit(doors: list[tuple[str, str, int]]) -> None:
    """Print what each door answers."""
    methods = _methods()
    answers = []
    for name, address, port in doors:
        host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(address, address)
        try:
            answer: dict[str, Any] = {"statuses": [_by_http(host, port, *request) for request in REQUESTS]}
        except http.client.BadStatusLine:
            answer = _by_grpc(host, port, methods)
        answers.append((name, address, port, answer))
    print(json.dumps(answers))


def _by_http(host: str, port: int, method: str, path: str) -> int:
    with contextlib.closing(http.client.HTTPConnection(host, port, timeout=ANSWER_S)) as connection:
        connection.request(method, path, body=b"{}" if method == "POST" else None)
        return connection.getresponse().status


def _by_grpc(host: str, port: int, methods: list[str]) -> dict[str, Any]:
    """Call them with nothing, until one does not refuse."""
    import grpc

    refused = 0
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in methods:
            try:
                channel.unary_unary(method)(b"", timeout=ANSWER_S)
                code = grpc.StatusCode.OK
            except grpc.RpcError as error:
                code = error.code()
            if code not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED):
                return {"refused": refused, "open": [method, code.name]}
            refused += code == grpc.StatusCode.UNAUTHENTICATED
    return {"refused": refused, "open": None}


def _methods() -> list[str]:
    """All that Ray's processes offer each other; those first that only ask, and so break nothing.

    Not gRPC's own, which Ray leaves open: whether a process is well, and the names of its services.
    """
    import ray.core.generated as generated

    found = {"/ray.rpc.ObjectManagerService/Pull", "/ray.rpc.ObjectManagerService/Push"}  # not there
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            described = importlib.import_module(f"{generated.__name__}.{module.name}").DESCRIPTOR
            for service in described.services_by_name.values():
                found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return sorted(found, key=lambda method: ("/Get" not in method, method))


if __name__ == "__main__":
    if sys.argv[1:]:
        _visit(json.loads(sys.argv[1]))
    else:
        _start_and_be_visited()
