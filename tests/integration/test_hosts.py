"""The README's commands across several hosts, and one that is cut off. More faults: benchmarks/faults.py."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import hosts
import jobs
import pytest
import slurm
import sshd
from hosts import Host

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
REASON = hosts.why_not() or sshd.why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(900),
]
# Run on the head, with the token: who gets an answer from the dashboard, and who may join the cluster.
PROBE = """
import os, pathlib, socket, subprocess, sys, urllib.error, urllib.request
own = socket.gethostbyname(os.uname().nodename)
def status(address, headers):
    request = urllib.request.Request(f"http://{address}:8265/api/version", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        return type(error.reason).__name__
token = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
print("loopback", status("127.0.0.1", token))
print("stranger", status(own, {}))
print("owner", status(own, token))
join = [sys.executable, "-c", "import ray; ray.init(); print('joined')"]
other = os.environ | {"RAY_AUTH_TOKEN": "0" * 64}
done = subprocess.run(join, env=other, capture_output=True, text=True, timeout=120)
print("joined with another token", "joined" in done.stdout)
token = os.environ["RAY_AUTH_TOKEN"].encode()
lines = []
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        lines.append(path.read_bytes())
    except OSError:
        continue  # it has just ended
print("raylets seen", sum(b"/raylet" in line.split(bytes(1))[0] for line in lines))
print("token on a command line", any(token in line for line in lines))
"""
# Run on the head: who decodes for a training run that is part of a cluster, and which images come.
DECODING = """
from dmx.data.dataset import open_dataset
from dmx.distributed import world
from dmx.ray_cluster import ray_cluster
from dmx.train.extraction import make_feed
with ray_cluster(), world(120.0) as place:
    split = open_dataset("data/campus").split("train")
    feed = make_feed(place, split, 32, 16, 4)
    rows = sorted(int(row) for rows, _ in feed.batches("test") for row in rows)
    print("decoded by", type(feed).__name__)
    print("all images", rows == list(range(len(split))))
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Host], str]]:
    """Four hosts, and the ssh command that reaches them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        hosts.hosts(4) as made,
        sshd.ssh_servers(made, tmp_path_factory.mktemp("ssh")) as ssh,
    ):
        yield made, ssh


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's commands run: a run that was interrupted, and its data."""
    folder = tmp_path_factory.mktemp("work")
    jobs.begin_run(folder / "runs/first")
    (folder / "data").mkdir()
    (folder / "data/campus").symlink_to(folder / "runs/data/target")
    return folder


@pytest.fixture(scope="module")
def reference(work: Path) -> Path:
    """The run of `work`, finished by two workers on one host."""
    job = jobs.train_job(work / "runs/first", work / "runs/reference")
    here(work, *job.words, "--launcher", "torchrun")
    return job.results


def readme_command(*words: str) -> list[str]:
    """The README's line that has these words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if all(word in line.split() for word in words)]
    assert len(found) == 1
    return [str(ROOT / word) if word.startswith("launch/") else word for word in found[0]]


def across_hosts(four: tuple[list[Host], str], work: Path, command: list[str]) -> str:
    """What the command prints, given on the fourth host."""
    made, ssh = four
    environment = made[-1].environment | faults.settings(ssh, work)
    with open(work / "said", "w+") as said:
        process = made[-1].start(*command, environment=environment, cwd=work, stdout=said, stderr=said)
        assert process.wait(400) == 0, (work / "said").read_text()[-4000:]
    return (work / "said").read_text()


def here(work: Path, *words: str) -> None:
    done = subprocess.run([BIN / words[0], *words[1:]], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_embedding_and_clustering_across_hosts_give_what_one_host_gives(
    four: tuple[list[Host], str], work: Path
) -> None:
    """To the bit. Embeddings come from three hosts, and labels from a worker on each."""
    here(work, "dmx", "embed", "runs/first", "data/campus", "--out", "features/alone")
    across_hosts(four, work, readme_command("launch/hosts.sh", "embed"))
    assert jobs.embedding_difference(work / "features/campus", work / "features/alone") == ""
    here(work, "dmx", "cluster", "features/campus", "--out", "clusters/alone", "--launcher", "inline")
    across_hosts(four, work, readme_command("launch/hosts.sh", "cluster"))
    assert jobs.label_difference(work / "clusters/campus", work / "clusters/alone") == ""


def test_the_dashboard_and_the_cluster_ask_for_the_token(four: tuple[list[Host], str], work: Path) -> None:
    """The dashboard answers on the private address alone; nobody joins with another token."""
    probe = work / "probe.py"
    probe.write_text(PROBE)
    command = [str(ROOT / "launch/hosts.sh"), "node1", "--", "python", str(probe)]
    said = across_hosts(four, work, command).splitlines()
    found = dict(line.rsplit(" ", 1) for line in said if line.count(" ") >= 1)
    assert found["loopback"] == "ConnectionRefusedError"
    assert found["stranger"] in ("401", "403")
    assert found["owner"] == "200"
    assert found["joined with another token"] == "False"
    assert int(found["raylets seen"]) > 0
    assert found["token on a command line"] == "False"
    assert (work / "token").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(("names", "feed"), [(["node1"], "LocalFeed"), (["node1", "node2"], "RayFeed")])
def test_the_cluster_decodes_where_it_has_several_hosts(
    four: tuple[list[Host], str], work: Path, names: list[str], feed: str
) -> None:
    """On one host Ray would only take memory: training decodes in its own threads there."""
    probe = work / "decoding.py"
    probe.write_text(DECODING)
    command = [str(ROOT / "launch/hosts.sh"), *names, "--", "python", str(probe)]
    said = across_hosts(four, work, command).splitlines()
    assert {f"decoded by {feed}", "all images True"} <= set(said)


def test_training_goes_on_when_a_host_is_cut_off(work: Path, reference: Path, tmp_path: Path) -> None:
    """From the last checkpoint, on a host that is left, with the result of two workers on one host."""
    job = jobs.train_job(work / "runs/first", tmp_path / "run")
    with hosts.hosts(4) as made, sshd.ssh_servers(made, tmp_path) as ssh:
        outcome = faults.run_job(job, made, ssh, tmp_path / "logs", "host cut off")
    assert job.difference(reference) == ""
    assert "start again from where they stood (1 of 3 times)" in outcome.said[-1]


@pytest.mark.slow
def test_a_signal_to_the_script_saves_before_ray_goes(work: Path, tmp_path: Path) -> None:
    """What the workers have trained, by the command, within ten seconds."""
    job = jobs.train_job(work / "runs/first", tmp_path / "run")
    with hosts.hosts(3) as made, sshd.ssh_servers(made, tmp_path) as ssh:
        process, log = faults._start(job, made, ssh, tmp_path / "logs", "first")
        hosts.wait_until(lambda: job.progress() >= job.strike_at, faults.COMING_S, "some steps", process)
        start = time.monotonic()
        (script,) = (pid for pid, words in made[-1].processes().items() if "hosts.sh" in words)
        os.kill(script, signal.SIGTERM)
        assert process.wait(60) == 143
        assert time.monotonic() - start < 10
    assert f"dmx train: stopped by SIGTERM at step {job.progress()} of 24, saved" in log.read_text()


@pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not()))
def test_slurm_takes_the_script_and_runs_it(
    four: tuple[list[Host], str], work: Path, reference: Path, tmp_path: Path
) -> None:
    """SLURM's own check of the script, then the README's line, on two nodes."""
    own = tmp_path / "own"
    run = jobs.train_job(work / "runs/first", own / "runs/first")
    made, ssh = four
    with slurm.slurm(made[:2], tmp_path) as environment:
        environment = environment | faults.settings(ssh, work) | {"PATH": f"{BIN}:{environment['PATH']}"}
        line = readme_command("sbatch")
        check = made[1].run("sbatch", "--test-only", *line[1:], environment=environment, timeout_s=60)
        assert check.returncode == 0, check.stderr
        assert "to start at" in check.stderr
        submit = made[1].start(line[0], "--wait", *line[1:], environment=environment, cwd=own)
        status = submit.wait(400)
    assert status == 0, "\n".join(path.read_text() for path in own.glob("*.log"))[-4000:]
    assert run.difference(reference) == ""
