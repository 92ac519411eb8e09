"""The scripts of launch/, as far as they can be checked without hosts, and what starts workers."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from dmx.errors import DmxError
from dmx.launching import check_launch, launch, take_place, tasks_by_node
from dmx.ray_workers import Crew, crew_of

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# Fields that the manifest may use and their types, from KubeRay's API reference (ray.io/v1, release 1.5).
KUBERAY: dict[str, dict[str, type | tuple[type, ...]]] = {
    "RayJobSpec": {
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "rayClusterSpec": dict,
    },
    "RayClusterSpec": {
        "rayVersion": str,
        "authOptions": dict,
        "headGroupSpec": dict,
        "workerGroupSpecs": list,
    },
    "HeadGroupSpec": {"serviceType": str, "rayStartParams": dict, "template": dict},
    "WorkerGroupSpec": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "rayStartParams": dict,
        "template": dict,
    },
}


def manifest() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((LAUNCH / "kuberay.yaml").read_text())
    return found


def groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def require_fields(kind: str, found: dict[str, Any]) -> None:
    for name, value in found.items():
        assert name in KUBERAY[kind], f"{kind} has no field {name}"
        assert isinstance(value, KUBERAY[kind][name]), f"{kind}.{name}: {value!r}"


def test_the_kuberay_manifest_has_the_fields_that_kuberay_reads() -> None:
    found = manifest()
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayJob")
    cluster = found["spec"]["rayClusterSpec"]
    require_fields("RayJobSpec", found["spec"])
    require_fields("RayClusterSpec", cluster)
    require_fields("HeadGroupSpec", cluster["headGroupSpec"])
    for group in cluster["workerGroupSpecs"]:
        require_fields("WorkerGroupSpec", group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(cluster):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_the_pods_of_the_kuberay_manifest_are_kubernetes_own() -> None:
    """Against the schema of Kubernetes itself, which knows every field of a pod."""
    for group in groups(manifest()["spec"]["rayClusterSpec"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dmx"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, "1.33", strict=True)


def test_ray_reads_the_kuberay_manifest_as_it_is_meant() -> None:
    """By the code with which Ray reads a RayCluster: cores and GPUs of head and workers."""
    cluster = {
        "metadata": {"name": "dmx", "namespace": "default"},
        "spec": manifest()["spec"]["rayClusterSpec"],
    }
    read = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert read["headgroup"]["resources"] | {"memory": 0} == {"CPU": 4, "GPU": 0, "memory": 0}
    assert read["gpu"]["resources"] | {"memory": 0} == {"CPU": 8, "GPU": 1, "memory": 0}
    words = manifest()["spec"]["entrypoint"].split()
    assert int(words[words.index("--workers") + 1]) == read["gpu"]["max_workers"]


def test_the_entrypoint_of_the_kuberay_manifest_is_a_command() -> None:
    from dmx.cli import build_parser

    words = manifest()["spec"]["entrypoint"].split()
    assert words[0] == "dmx"
    build_parser().parse_args(words[1:])


def token(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    settings = clean | {"HOME": str(home)} | environment
    return subprocess.run(
        [LAUNCH / "token.sh"], env=settings, capture_output=True, text=True, check=False, umask=0
    )


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    first = token(tmp_path)
    path = Path(first.stdout.strip())
    assert path == tmp_path / ".ray/auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) == 64
    before = path.read_text()
    assert token(tmp_path).stdout == first.stdout
    assert path.read_text() == before
    other = tmp_path / "other"
    assert token(tmp_path, RAY_AUTH_TOKEN_PATH=str(other)).returncode == 0
    assert other.read_text() != before


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = Path(token(tmp_path).stdout.strip())
    path.chmod(0o640)
    refused = token(tmp_path)
    assert refused.returncode == 2
    assert "wants mode 600, found 640" in refused.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.s*")))
def test_scripts_are_bash_and_executable_where_they_are_called(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK) == (not script.endswith(".sbatch"))


def test_hosts_share_workers_out_by_cores_and_gpus() -> None:
    """As many cores as fit; with GPUs, no more workers than those."""
    two = {"a": {"CPU": 8.0}, "b": {"CPU": 4.0}}
    assert crew_of(two, 1) == Crew(1, 8, False)
    assert crew_of(two, 2) == Crew(2, 4, False)
    assert crew_of(two, 3) == Crew(3, 4, False)
    assert crew_of(two, 12) == Crew(12, 1, False)
    assert crew_of(two, 13) is None
    gpus = {"head": {"CPU": 16.0}, "a": {"CPU": 8.0, "GPU": 2.0}, "b": {"CPU": 8.0, "GPU": 2.0}}
    assert crew_of(gpus, 4) == Crew(4, 4, True)
    assert crew_of(gpus, 5) is None
    assert crew_of({}, 1) is None


def test_a_task_of_srun_knows_its_place() -> None:
    assert tasks_by_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_by_node("4") == [4]
    told = {
        "SLURM_PROCID": "4",
        "SLURM_NODEID": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    }
    found = dict(told)
    take_place(found)
    assert found == told | {"RANK": "4", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    already = told | {"RANK": "1"}
    take_place(already)
    assert already == told | {"RANK": "1"}


def refuse(folder: str, local: tuple[int, int] | None = None) -> None:
    """A task that wants the user to change something, and notes each start: the interface of its Gloo."""
    starts = Path(folder) / "starts.json"
    before = json.loads(starts.read_text()) if starts.exists() else []
    starts.write_text(json.dumps([*before, os.environ.get("GLOO_SOCKET_IFNAME")]))
    raise DmxError("optim.lr is too high")


def test_what_the_user_has_to_change_is_told_once_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers are on one host, and say to each other what no other host has to hear."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(DmxError, match=r"^optim\.lr is too high$"):
        launch(
            "test_launch_scripts:refuse",
            {"folder": str(tmp_path)},
            folder=tmp_path,
            launcher="torchrun",
            workers=1,
            timeout_s=60,
        )
    assert json.loads((tmp_path / "starts.json").read_text()) == ["lo"]
    assert [path.name for path in tmp_path.iterdir()] == ["starts.json"]


def test_srun_wants_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(DmxError, match="found none: start it in sbatch or salloc"):
        check_launch("srun", 2)
