"""What a run was started with: code, versions, data; and what it says when they changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tiny

from dmx.data.dataset import open_dataset
from dmx.data.fingerprint import describe_dataset
from dmx.data.manifest import MANIFEST_NAME
from dmx.train.provenance import (
    CODE,
    STARTS,
    check_data,
    code_state,
    git_state,
    machine_versions,
    record_start,
)
from dmx.train.runlog import read_lines

DATA = {"source": {"path": "a", "rows": {"train": 3}, "of": "manifest", "sha256": "0" * 64}}


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *names, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("print(1)\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def test_a_clean_repository(repository: Path, tmp_path: Path) -> None:
    assert git_state(repository, tmp_path / CODE) == {
        "commit": git(repository, "rev-parse", "HEAD"),
        "is_dirty": False,
        "diff_sha256": None,
        "untracked": 0,
    }
    assert not (tmp_path / CODE).exists()


def test_uncommitted_changes_are_kept_and_can_be_applied(repository: Path, tmp_path: Path) -> None:
    (repository / "train.py").write_text("print(2)\n")
    (repository / "notes.txt").write_text("x")
    state = git_state(repository, tmp_path / CODE)
    assert (state["is_dirty"], state["untracked"]) == (True, 1)
    (diff,) = (tmp_path / CODE).iterdir()
    assert hashlib.sha256(diff.read_bytes()).hexdigest() == state["diff_sha256"]
    assert diff.stem == state["diff_sha256"][:16]
    git(repository, "checkout", "-q", "train.py")
    git(repository, "apply", str(diff))
    assert (repository / "train.py").read_text() == "print(2)\n"


def test_a_large_difference_is_known_by_its_hash_alone(repository: Path, tmp_path: Path) -> None:
    (repository / "train.py").write_text("\n".join(map(str, range(300_000))))
    assert len(git_state(repository, tmp_path / CODE)["diff_sha256"]) == 64
    assert not (tmp_path / CODE).exists()


def test_a_repository_without_a_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path, tmp_path / CODE)["commit"] is None


def test_the_current_folder_counts_where_it_is_a_repository(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    assert code_state(tmp_path / CODE)["folder"]["commit"] == git(repository, "rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)
    assert "folder" not in code_state(tmp_path / CODE)


def test_without_git_there_is_no_state_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_state(tmp_path / CODE) == {}
    assert record_start(tmp_path, DATA, {}, 0) is None
    assert read_lines(tmp_path / STARTS)[0]["code"] == {}


def test_every_start_is_a_line_and_says_what_is_other_code(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.chdir(repository)
    assert record_start(run, DATA, {}, 0) is None
    assert record_start(run, DATA, {"seed": (0, 1)}, 7) is None, "nothing differs"
    before = git(repository, "rev-parse", "HEAD")
    (repository / "train.py").write_text("print(3)\n")
    assert f"folder: commit {before[:10]} -> commit {before[:10]} with changes" in str(
        record_start(run, DATA, {}, 9)
    )
    git(repository, "commit", "-qam", "second")
    assert f"-> commit {git(repository, 'rev-parse', 'HEAD')[:10]}" in str(record_start(run, DATA, {}, 9))
    starts = read_lines(run / STARTS)
    assert [line["first_step"] for line in starts] == [0, 7, 9, 9]
    assert starts[1]["changed"] == {"seed": [0, 1]}
    assert starts[0]["versions"].keys() > {"python", "torch", "cuda", "driver", *machine_versions()}
    here = {os.uname().nodename, str(Path.home()), str(tmp_path)}
    assert not any(word in json.dumps(starts) for word in here if len(word) > 5), (
        "no host and no folder of mine"
    )


def test_data_sets_are_told_apart(tmp_path: Path) -> None:
    """An ingested one by its manifest, wherever it lies; one in place by names and sizes."""
    tiny.write_set(tmp_path / "a", 1, {"train": 2})
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    tiny.write_set(tmp_path / "b", 2, {"train": 2})
    found = [describe_dataset(open_dataset(tmp_path / name)) for name in ("a", "copy", "b")]
    assert found[0]["sha256"] == hashlib.sha256((tmp_path / "a" / MANIFEST_NAME).read_bytes()).hexdigest()
    assert found[0]["sha256"] == found[1]["sha256"] != found[2]["sha256"]
    assert (found[0]["rows"], found[0]["of"]) == ({"train": 18}, "manifest")


def test_a_set_in_place_is_known_by_its_listing(tmp_path: Path) -> None:
    def described() -> str:
        found = describe_dataset(open_dataset(tmp_path / "set", "folder"))
        assert (found["of"], found["rows"]) == (
            "listing",
            {"train": len(list((tmp_path / "set").glob("*/*")))},
        )
        return str(found["sha256"])

    for person in ("1", "2"):
        (tmp_path / "set" / person).mkdir(parents=True)
        (tmp_path / "set" / person / "a.jpg").write_bytes(b"1234")
    first = described()
    shutil.copytree(tmp_path / "set", tmp_path / "elsewhere")
    assert describe_dataset(open_dataset(tmp_path / "elsewhere", "folder"))["sha256"] == first
    (tmp_path / "set" / "1" / "a.jpg").write_bytes(b"12345")
    assert described() != first
    (tmp_path / "set" / "1" / "a.jpg").write_bytes(b"1234")
    assert described() == first
    (tmp_path / "set" / "2" / "b.jpg").write_bytes(b"1234")
    assert described() != first


def test_changed_data_is_an_error_that_says_so(tmp_path: Path) -> None:
    tmp_path.joinpath(STARTS).write_text(json.dumps({"data": DATA}) + "\n")
    check_data(tmp_path, DATA)
    check_data(tmp_path, {})
    check_data(tmp_path, {"target": {**DATA["source"], "sha256": "1" * 64}})  # that is a change of settings
    other: Any = {"source": {**DATA["source"], "rows": {"train": 4}, "sha256": "1" * 64}}
    with pytest.raises(
        Exception, match=r"a \(source\) is not what .* wanted 3 images in train .* found 4"
    ) as error:
        check_data(tmp_path, other)
    assert "--allow-changed-data" in str(error.value)
