"""The GPU benchmark without a GPU: its arithmetic, its model, and a whole run of it on a CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
RESULTS = FOLDER / "results"
STAGES = {"self_knn", "k_reciprocal", "jaccard_pairs", "dbscan", "pseudo_labels", "knn"}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of the benchmarks by its name, as they import each other."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in ("gpu", "model", "tables"):
        if name not in before:
            sys.modules.pop(name, None)


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def without_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# --- the model --------------------------------------------------------------------------------------------


def test_the_scan_is_the_gemm_of_the_design(scripts: Any) -> None:
    """5.5 ms, 5.1 s and 89.5 s at 800 TFLOP/s for 32,621, a million and 4.18 million rows of 2048."""
    model = scripts("model")
    for n, seconds in ((32_621, 5.45e-3), (1_000_000, 5.12), (4_180_000, 89.5)):
        passes = model.scan_counts(n, n, 2048, 4, False, 256)["scan"].flop
        ring = model.scan_counts(n, n, 2048, 4, True, 256)["scan"].flop
        assert passes / 800e12 == pytest.approx(seconds, rel=1e-3)
        assert ring == passes / 2


def test_stages_are_what_a_hand_computes(scripts: Any) -> None:
    """A million rows of 2048 float32 numbers at 800 TFLOP/s, 3 TB/s and 28.7 T instructions a second."""
    model = scripts("model")
    found = model.predict(1_000_000, 2048)
    assert found["scan"] == pytest.approx(2.048e15 / (0.7 * 8e14) + 4e12 / 28.7e12 + 2e-4)
    # 34 rows of 8,192 bytes and 32 bytes of notes, 30 results of 12.
    assert found["rescore"] == pytest.approx(1e6 * (34 * 8224 + 360) / 3e12 + 2e-4)
    # 12 rounds; comparing 68 candidates with 256 slots costs more than 816 bytes of traffic.
    assert found["tighten"] == pytest.approx(1e6 * 12 * 6 * 34 * 256 / 28.7e12 + 36e-5)
    assert found["prepare"] == pytest.approx(1e6 * 2048 * 18 / 3e12 + 4e-4)
    assert found["total"] == pytest.approx(sum(found[stage] for stage in model.OPERATIONS["pseudo_labels"]))


def test_predictions_scale_as_they_must(scripts: Any) -> None:
    model = scripts("model")
    one, two = model.predict(1e6, 512), model.predict(2e6, 512)
    assert two["scan"] / one["scan"] == pytest.approx(4, rel=1e-3)
    assert two["rescore"] / one["rescore"] == pytest.approx(2, rel=0.01)
    many = model.predict(1e8, 2048, gpus=256)
    assert many["scan"] == pytest.approx(model.predict(1e8, 2048)["scan"] / 256, rel=1e-3)
    # Half a ring, 127 3/4 shards of 390,625 rows: 8,192 bytes, 16 beside them, lists of 360; at 50 GB/s.
    assert many["ring"] == pytest.approx(127.75 * 390_625 * 8568 / 50e9)


def test_model_json_is_what_the_model_says(scripts: Any) -> None:
    model = scripts("model")
    found = load("model")
    ceilings = {name: value for name, value in found["ceilings"].items() if name != "source"}
    wanted = model.build(model.Ceilings(**ceilings), found["ceilings"]["source"], load("gpu"))
    assert json.loads(json.dumps(wanted)) == found, "run python benchmarks/model.py"


def test_predictions_that_are_far_off_are_listed(scripts: Any) -> None:
    model = scripts("model")
    shape = {"n": 32_621, "d": 512, "kind": "clustered", "dtype": "float32"}
    expected = model.operations(model.predict(32_621, 512))["dbscan"]
    rows = [
        {**shape, "stage": "dbscan", "seconds": 2 * expected},
        {**shape, "stage": "jaccard_pairs", "seconds": None},
        {
            **shape,
            "stage": "k_reciprocal",
            "seconds": model.operations(model.predict(32_621, 512))["k_reciprocal"],
        },
    ]
    found = model.build(model.Ceilings(), "a test", {"gpu": {"name": "a test"}, "rows": rows})
    assert [pair["stage"] for pair in found["measurements"]] == ["dbscan", "k_reciprocal"]
    assert [pair["stage"] for pair in found["off"]] == ["dbscan"]
    assert found["off"][0]["ratio"] == pytest.approx(2, rel=1e-3)
    none = model.build(model.Ceilings(), "a test", {"gpu": None})
    assert none["measurements"] is None
    assert none["off"] is None
    assert "no GPU has been measured" in none["verdict"]


# --- the benchmark ----------------------------------------------------------------------------------------


def test_shares_are_those_of_the_formulas(scripts: Any) -> None:
    gpu = scripts("gpu")
    shape = {"n": 1000, "d": 100, "kind": "clustered", "dtype": "float32"}
    entry = {**shape, "operations": {"self_knn": 0.5}, "rivals": {}}
    ceilings = {"gemm_tflops": 800.0, "copy_tb_s": 3.0}
    row = {
        **shape,
        "stage": "self_knn",
        "seconds": 1.0,
        "flop_n2": 4e14,
        "flop_executed": 2e14,
        "scores": 10**12,
    }
    found = gpu.with_shares(row, ceilings, [entry])
    assert (found["tflops_n2"], found["gemm_share_n2"], found["gemm_share_executed"]) == (400, 0.5, 0.25)
    assert (found["picoseconds_a_score"], found["measured_by_predicted"]) == (1.0, 2.0)
    assert found["copy_share"] is None
    row = {**shape, "stage": "dbscan", "seconds": 2.0, "bytes": 3 * 10**12}
    found = gpu.with_shares(row, ceilings, [])
    assert found["copy_share"] == 0.5
    assert found["predicted_s"] is None
    assert gpu.with_shares({**row, "seconds": None}, ceilings, [entry])["copy_share"] is None


def test_the_most_important_comes_first_and_nothing_twice(scripts: Any) -> None:
    gpu = scripts("gpu")
    found = gpu.jobs(gpu.ROWS, gpu.WIDTHS, "cuda", [8192], True)
    assert [job["job"] for job in found[:3]] == ["check", "check", "stages"]
    stages = [job for job in found if job["job"] == "stages"]
    assert len(stages) == 3 * 4 * 2 * 2
    assert [(job["n"], job["d"]) for job in stages[:3]] == [
        (32_621, 2048),
        (1_000_000, 2048),
        (1_000_000, 512),
    ]
    keys = [json.dumps(job, sort_keys=True) for job in found]
    assert len(set(keys)) == len(keys)
    every = {(entry["n"], entry["d"], entry["kind"], entry["dtype"]) for entry in load("model")["benchmark"]}
    assert {(job["n"], job["d"], job["kind"], job["dtype"]) for job in stages} == every


def test_what_does_not_fit_is_skipped_and_said(scripts: Any, tmp_path: Path) -> None:
    gpu = scripts("gpu")
    results = {"gpu": None, "ceilings": {"gemm_tflops": 1.0, "copy_tb_s": 1.0}}
    results |= {name: [] for name in ("checks", "rows", "rivals", "failed", "skipped")}
    out = tmp_path / "out.json"

    def worker(job: dict[str, Any], limit_s: float) -> Iterator[dict[str, Any]]:
        for _ in range(2):
            yield {"stage": "self_knn", "seconds": 1.0, **job}
            assert json.loads(out.read_text())["rows"] == results["rows"], "saved before the next is measured"

    todo = gpu.jobs([32_621, 1_000_000], [2048], "cuda", [], False)
    gpu.run(todo, worker, results, load("model")["benchmark"], out, time.monotonic() + 40)
    saved = json.loads(out.read_text())
    assert len(saved["rows"]) + 2 * len(saved["skipped"]) == 2 * len(todo)
    skipped = {(job["job"], job["n"], job["dtype"]) for job in saved["skipped"]}
    assert ("stages", 1_000_000, "float32") in skipped
    assert ("stages", 32_621, "float32") not in skipped
    assert all("s were left" in job["reason"] for job in saved["skipped"])


def test_a_worker_that_dies_or_hangs_costs_one_job(scripts: Any) -> None:
    gpu = scripts("gpu")
    code = (
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)['job']\n"
        "    if job == 'die': sys.exit(3)\n"
        "    if job == 'hang': time.sleep(60)\n"
        "    print(json.dumps({'row': job})); print(json.dumps({'done': True}), flush=True)\n"
    )
    worker = gpu.Worker([sys.executable, "-c", code])
    try:
        assert list(worker({"job": "one"}, 30)) == [{"row": "one"}]
        assert "status 3" in next(iter(worker({"job": "die"}, 30)))["failed"]
        assert list(worker({"job": "two"}, 30)) == [{"row": "two"}]
        assert "did not end within 1 s" in next(iter(worker({"job": "hang"}, 1)))["failed"]
        assert list(worker({"job": "three"}, 30)) == [{"row": "three"}]
    finally:
        worker.stop()


def test_without_a_gpu_it_says_so_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = without_gpu("--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    found = json.loads(out.read_text())
    assert found["gpu"] is None
    assert found["reason"] == "torch found no CUDA device"
    out.write_text('{"gpu": {"name": "measured"}}')
    done = without_gpu("--out", str(out))
    assert done.returncode != 0
    assert "nothing was written" in done.stderr
    assert out.read_text() == '{"gpu": {"name": "measured"}}'


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run on the CPU, of a size that takes seconds."""
    out = tmp_path_factory.mktemp("gpu") / "trial.json"
    done = without_gpu(
        "--device", "cpu", "--rows", "300", "--widths", "32", "--dense", "200", "--out", str(out)
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_trial_measures_every_stage_and_passes_every_check(trial: dict[str, Any]) -> None:
    assert trial["failed"] == []
    assert trial["skipped"] == []
    for kind in ("clustered", "random"):
        for dtype in ("float32", "bfloat16"):
            rows = [row for row in trial["rows"] if (row["kind"], row["dtype"]) == (kind, dtype)]
            assert {row["stage"] for row in rows} == STAGES
    checked = {row["check"] for row in trial["checks"]}
    assert checked == {"self_knn", "knn", "labels", "labels against the CPU"}
    assert all(row["passed"] for row in trial["checks"])
    assert max(row.get("identities", 0) for row in trial["checks"]) >= 10
    for row in trial["rows"]:
        assert row["repeats"] == len(row["seconds_all"]) == 7
        assert row["seconds"] == sorted(row["seconds_all"])[3]


def test_a_trial_claims_nothing_it_did_not_measure(trial: dict[str, Any]) -> None:
    assert trial["gpu"] is None
    for row in trial["rows"]:
        assert row["peak_bytes"] is None
        assert row["predicted_s"] is None
        assert (row["tflops_n2"] is None) == ("flop_n2" not in row)
        assert (row["copy_share"] is None) == ("bytes" not in row)
    absent = [row for row in trial["rivals"] if row.get("reason") == "not installed"]
    assert all(row["seconds"] is None and row["recall"] is None for row in absent)


def test_rivals_are_compared_by_what_they_find(trial: dict[str, Any]) -> None:
    recall = {row["rival"]: row["recall"] for row in trial["rivals"] if row["kind"] == "clustered"}
    assert recall["matmul float32"] == 1.0
    assert 0.95 < recall["matmul bfloat16"] <= 1.0
    dense = [row for row in trial["rivals"] if row["rival"] == "published dense way"]
    assert len(dense) == 1
    assert not any(dense[0]["labels_differing"].values())


def test_the_readme_says_when_no_gpu_was_measured(scripts: Any, trial: dict[str, Any]) -> None:
    tables = scripts("tables")
    words = tables.gpu({"gpu": None, "reason": "torch found no CUDA device", "date": "2026-01-01"})
    assert words.startswith("No GPU has been measured yet")
    assert "|" not in words
    table = tables.gpu({**trial, "gpu": {"name": "A"}})
    assert "| 300 | 32 |" in table
    assert "on one A" in table
    predictions = tables.model(load("model"))
    assert "not measured" in predictions
    assert "| 100,000,000 | 2048 | 256 |" in predictions


@pytest.mark.parametrize(
    "text", ["<!-- table: demo -->\ntext\n<!-- table: ivf -->\n<!-- end -->", "<!-- end -->"]
)
def test_a_table_without_its_end_is_not_filled(scripts: Any, text: str) -> None:
    """It would swallow everything up to the end of the next."""
    with pytest.raises(SystemExit, match="an end mark after every table mark"):
        scripts("tables").filled(text)


def test_a_mark_that_does_not_end_its_line_is_not_passed_over(scripts: Any) -> None:
    with pytest.raises(SystemExit, match="wanted the mark of table ivf alone on its line"):
        scripts("tables").filled("<!-- table: ivf --> here\n<!-- end -->")
