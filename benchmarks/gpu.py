"""DMX on one NVIDIA GPU against its ceilings, its predictions and its rivals, in one command of ten minutes.

    python benchmarks/gpu.py                 everything, the most important first, until the time is used up
    python benchmarks/gpu.py --tune          only the configurations of the scan
    python benchmarks/gpu.py --device cpu --rows 500 --widths 64 --out try.json     the harness, without a GPU

Both ceilings (bf16 GEMM, copy) are measured first and last. Then every stage at N = 32,621, 131,072 and a
million, D = 128 to 2048, on clustered and random features in float32 and bfloat16, and the rivals of
`rivals.py`. Results are written after every row; what no longer fits into the time is listed as skipped.

Fields of a row: `seconds`, the median; `tflops_n2`, of 2 N^2 D operations, and `tflops_executed`, of those
really done (half of them where symmetry is used), with their shares of the GEMM ceiling;
`picoseconds_a_score`, of N^2; `copy_share`: the bytes that a stage has to read and write once
(`bytes_formula`) against the copy ceiling; `predicted_s` by `model.py`, written before the measurement, and
`measured_by_predicted`. A field that was not measured is null.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
ROWS, WIDTHS = (32_621, 131_072, 1_000_000), (2048, 512, 128, 256)
KINDS, DTYPES = ("clustered", "random"), ("float32", "bfloat16")
PRECISIONS = ("bfloat16", "tf32", "float32")
DERIVED = (
    "tflops_n2", "gemm_share_n2", "tflops_executed", "gemm_share_executed", "picoseconds_a_score",
    "copy_share", "predicted_s", "measured_by_predicted",
)  # fmt: skip
START_S = 20.0  # what a job may need beside the calls it times: a process, features, compilation
Job = dict[str, Any]
Row = dict[str, Any]


class Worker:
    """A process of `gpu_worker.py`, started anew when it has died."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process, self._lines = process, queue.Queue()

        def read(lines: queue.Queue[str | None]) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(self._lines,), daemon=True).start()
        return process

    def __call__(self, job: Job, limit_s: float) -> Iterator[Row]:
        """Rows of a job; the last has `failed` when it died or did not end within `limit_s`."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._start()
        assert process.stdin is not None
        end = time.monotonic() + limit_s
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                self.stop()
                yield {"failed": f"did not end within {limit_s:.0f} s", **job}
                return
            if line is None:
                status = process.wait()
                self.stop()
                yield {"failed": f"the process ended with status {status}", **job}
                return
            row = json.loads(line)
            if row.get("done"):
                return
            yield row

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def jobs(
    rows: Sequence[int], widths: Sequence[int], device: str, dense: Sequence[int], installed: bool
) -> list[Job]:
    """All that is measured after the ceilings, the most important first.

    The first of `widths` counts most. Packages that are not `installed` get one row that says so.
    """
    small, large, width = min(rows), max(rows), widths[0]
    found: list[Job] = []

    def add(
        kind: str, n: int, d: int, features: str = "clustered", dtype: str = "float32", **more: Any
    ) -> None:
        job = {"job": kind, "n": n, "d": d, "kind": features, "dtype": dtype, "device": device, **more}
        if job not in found:
            found.append(job)

    def rivals(n: int, d: int, features: str = "clustered", precision: str = "bfloat16") -> None:
        add("torch", n, d, features, precision=precision, compiled=False)
        if precision != "tf32" and (installed or (n, d) == (small, width)):
            add("packages", n, d, features, precision=precision)

    for features, dtype in (("clustered", "float32"), ("random", "bfloat16")):
        add("check", min(1500, small), widths[-1], features, dtype)
    add("stages", small, width)
    rivals(small, width)
    for d in widths[:2]:
        add("stages", large, d)
        rivals(large, d)
    for precision in ("tf32", "float32"):
        rivals(small, width, precision=precision)
    if device != "cpu":
        add("torch", small, width, precision="bfloat16", compiled=True)
    for dtype in DTYPES:
        for features in KINDS:
            for n in sorted(rows):
                for d in widths:
                    add("stages", n, d, features, dtype)
    add("check_cpu", small, width)
    for n in dense[:1]:
        add("dense", n, width)
    for features in KINDS:
        for precision in PRECISIONS:
            for n in sorted(rows):
                for d in widths:
                    rivals(n, d, features, precision)
    for n in dense[1:]:
        add("dense", n, width)
    return found


def tuning_jobs(rows: Sequence[int], widths: Sequence[int], device: str) -> list[Job]:
    """The shapes on which configurations are compared."""
    return [
        {"job": "tune", "n": n, "d": d, "kind": "clustered", "dtype": "float32", "device": device}
        for n in sorted(rows) for d in widths
    ]  # fmt: skip


def needed_s(job: Job, predictions: Sequence[Row], seconds: float = 12.0, repeats: int = 7) -> float:
    """Roughly how long a job takes by the model; START_S where it says nothing.

    A row takes one run to warm up, and as many as `seconds` allow, one at least and `repeats` at most.
    """
    if job["job"] == "check_cpu":
        return 60.0  # numba compiles
    if job["job"] == "dense":
        return START_S + 13.5 * (job["n"] / 8192) ** 1.65  # as on the two cores of results/cluster_cpu.json
    entry = entry_of(job, predictions)
    times: list[float] = []
    if entry is not None and job["job"] == "stages":
        times = [float(one) for one in entry["operations"].values()]
    elif entry is not None and job["job"] == "torch":
        times = [min(entry["rivals"][f"matmul {job['precision']}"], seconds)]
    return START_S + sum(one + max(one, min(repeats * one, seconds)) for one in times)


def entry_of(row: Row, predictions: Sequence[Row]) -> Row | None:
    """The predictions for the shape and type of a row or job, None where there are none."""
    for entry in predictions:
        if all(entry[key] == row.get(key) for key in ("n", "d", "kind", "dtype")):
            return entry
    return None


def with_shares(row: Row, ceilings: Row, predictions: Sequence[Row]) -> Row:
    """A row with its rates, shares of the ceilings and ratio to the prediction, by the formulas on top."""
    seconds, entry = row.get("seconds") or row.get("seconds_scaled"), entry_of(row, predictions)
    expected = None
    if entry is not None:
        expected = entry["operations"].get(row.get("stage")) or entry["rivals"].get(row.get("rival"))
    out = {**dict.fromkeys(DERIVED), **row, "predicted_s": expected}
    if not seconds:
        return out
    if expected:
        out["measured_by_predicted"] = seconds / expected
    for name in ("n2", "executed"):
        if f"flop_{name}" in row:
            out[f"tflops_{name}"] = row[f"flop_{name}"] / seconds / 1e12
            out[f"gemm_share_{name}"] = out[f"tflops_{name}"] / ceilings["gemm_tflops"]
    if "scores" in row:
        out["picoseconds_a_score"] = seconds / row["scores"] * 1e12
    if "bytes" in row:
        out["copy_share"] = row["bytes"] / seconds / 1e12 / ceilings["copy_tb_s"]
    return out


def figure(value: float | None, digits: int = 3) -> str:
    """A number for the terminal, a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}g}"


def line(row: Row) -> str:
    """A row for the terminal."""
    shape = f"{row.get('n', 0):>9,} x {row.get('d', 0):<5} {row.get('kind', ''):<10}{row.get('dtype', ''):<9}"
    if "failed" in row:
        return f"{row.get('stage') or row.get('job', ''):<26}{shape} FAILED: {row['failed']}"
    if "check" in row:
        verdict = "right" if row["passed"] else "WRONG"
        return f"check {row['check']:<20}{shape} {verdict}, {row['rows_checked']} rows"
    name = str(row.get("stage") or row.get("rival"))
    if "reason" in row:
        return f"{name:<26}{shape} {row['reason']}"
    seconds = row.get("seconds") or row.get("seconds_scaled")
    rate = row.get("gemm_share_n2") or row.get("copy_share")
    of = "GEMM" if row.get("gemm_share_n2") else "copy"
    return (
        f"{name:<26}{shape} {figure(seconds):>9} s  predicted {figure(row.get('predicted_s')):>8}"
        f"  {f'{100 * rate:.0f} % of {of}' if rate else '':<13}"
        f"  {figure(row.get('picoseconds_a_score')):>7} ps/score"
        f"  {figure(None if row.get('peak_bytes') is None else row['peak_bytes'] / 2**30):>6} GiB"
        + (f"  recall {row['recall']:.4f}" if row.get("recall") is not None else "")
        + (f"  {row['config']}" if "config" in row else "")
    )  # fmt: skip


def summary(results: Row) -> list[str]:
    """Seconds of every stage by shape, and the share of the GEMM ceiling that 2 N^2 D operations make."""
    names = ("self_knn", "k_reciprocal", "jaccard_pairs", "dbscan", "pseudo_labels", "knn")
    shapes: dict[str, Row] = {}
    for row in results["rows"]:
        shape = f"{row['n']:>9,} x {row['d']:<5} {row['kind']:<10}{row['dtype']:<9}"
        shapes.setdefault(shape, {})[row["stage"]] = row
    lines = [f"{'seconds':<36}" + "".join(f"{name:>14}" for name in names) + f"{'of GEMM':>9}"]
    for shape, stages in shapes.items():
        cells = "".join(f"{figure(stages.get(name, {}).get('seconds')):>14}" for name in names)
        share = stages.get("self_knn", {}).get("gemm_share_n2")
        lines.append(f"{shape:<36}{cells}{'-' if share is None else f'{share:.0%}':>9}")
    return lines


def save(results: Row, out: Path) -> None:
    """Writes the results whole, or leaves the file as it was."""
    temporary = out.with_suffix(".part")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


def refuse_to_lose(out: Path) -> None:
    """Ends the program when `out` holds what a GPU measured and this run has none.

    Raises:
        SystemExit: it does.
    """
    if out.exists() and json.loads(out.read_text(encoding="utf-8"))["gpu"] is not None:
        raise SystemExit(f"{out}: holds results of a GPU, and this run has none; nothing was written")


def file_row(results: Row, row: Row, predictions: Sequence[Row]) -> Row:
    """Puts a row where it belongs, with its shares."""
    if "failed" in row:
        results["failed"].append(row)
    elif "check" in row:
        results["checks"].append(row)
    else:
        row = with_shares(row, results["ceilings"] or {}, predictions)
        results["rivals" if "rival" in row else "rows"].append(row)
    return row


def run(
    todo: Sequence[Job], worker: Worker, results: Row, predictions: Sequence[Row], out: Path, end: float
) -> None:
    """Does the jobs that fit, and saves after every row."""
    for job in todo:
        left = end - time.monotonic()
        needs = needed_s(job, predictions)
        if needs > left:
            reason = f"needs about {needs:.0f} s, and {left:.0f} s were left"
            results["skipped"].append({**job, "reason": reason})
        else:
            for row in worker(job, left):
                print(line(file_row(results, row, predictions)), flush=True)
                save(results, out)
    save(results, out)


def ceilings_of(worker: Worker, device: str, limit_s: float) -> Row | None:
    """The ceilings now; None where measuring them failed."""
    size, copy = (8192, 2**31) if device == "cuda" else (512, 2**22)
    job = {"job": "ceilings", "device": device, "gemm_size": size, "copy_bytes": copy}
    row = list(worker(job, limit_s))[-1]
    print(f"ceilings: {row}", flush=True)
    return None if "failed" in row else row


def measure(arguments: argparse.Namespace, worker: Worker, out: Path, end: float) -> Row | None:
    """All results, saved as they came; None where there is no GPU, which `out` then says.

    Raises:
        SystemExit: nothing can be measured, or `out` holds a GPU's results and this run has none.
    """
    device = arguments.device
    found = list(worker({"job": "environment", "device": "cpu"}, 120))[-1]
    if "failed" in found:
        raise SystemExit(f"the measuring process does not start: {found['failed']}")
    results: Row = {
        "gpu": found["gpu"] if device == "cuda" else None, "reason": None,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": found["versions"], "packages": found["packages"],
    }  # fmt: skip
    if results["gpu"] is None:
        refuse_to_lose(out)
        results["reason"] = "--device cpu: a trial of the harness"
        if device == "cuda":
            results["reason"] = "torch found no CUDA device"
            save(results, out)
            return None
    results["ceilings"] = ceilings_of(worker, device, end - time.monotonic())
    if results["ceilings"] is None:
        raise SystemExit("the ceilings could not be measured; nothing was written")
    results |= {"ceilings_after": None, "checks": [], "rows": [], "rivals": [], "failed": [], "skipped": []}
    if arguments.tune:
        todo = tuning_jobs(arguments.rows, arguments.widths, device)
    else:
        installed = any(found["packages"][name] for name in ("flashlib", "flash-kmeans"))
        todo = jobs(arguments.rows, arguments.widths, device, arguments.dense, installed)
    predictions = json.loads(arguments.model.read_text(encoding="utf-8"))["benchmark"]
    run(todo, worker, results, predictions, out, end - 5)
    results["ceilings_after"] = ceilings_of(worker, device, 60)
    save(results, out)
    return results


def main() -> int:
    """Measure, print, save; status 1 when a check went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="the first counts most")
    parser.add_argument("--dense", type=int, nargs="*", default=[8192, 32_621], help="sizes of the dense way")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds in all")
    parser.add_argument("--tune", action="store_true", help="only compare the configurations of the scan")
    parser.add_argument("--model", type=Path, default=RESULTS / "model.json")
    parser.add_argument("--out", type=Path, help="default: gpu.json in results/, gpu_tune.json with --tune")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.budget
    if arguments.device == "cpu" and arguments.out is None:
        parser.error("--device cpu measures no GPU: name another file with --out")
    out = arguments.out or RESULTS / ("gpu_tune.json" if arguments.tune else "gpu.json")
    worker = Worker([sys.executable, str(FOLDER / "gpu_worker.py")])
    try:
        results = measure(arguments, worker, out, end)
    finally:
        worker.stop()
    if results is None:
        print(f"torch found no CUDA device: nothing was measured, and {out} says so")
        return 0
    for text in summary(results):
        print(text)
    count = {name: len(results[name]) for name in ("rows", "rivals", "checks", "failed", "skipped")}
    wrong = sum(not row["passed"] for row in results["checks"])
    print(", ".join(f"{number} {name}" for name, number in count.items()) + f", {wrong} checks wrong: {out}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
