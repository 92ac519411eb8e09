"""What every stage should cost on GPUs, from counts alone: time and memory by images, width and GPUs.

    python benchmarks/model.py                                        with the default ceilings
    python benchmarks/model.py --ceilings benchmarks/results/gpu.json     with those measured there

Legend: N images of width D, b bytes a number (float32: 4); W = D rounded up to 64; K = 30 neighbours, h = 16
of them in the half lists, k2 = 6 averaged; S = 256 slots a row of the candidate buffers; 3 radii; G GPUs with
n = N / G rows each; c candidates rescored. COUNTED below: m of K mutual, E1 and E2 entries a row of V before
and after expansion, x members of a row that are no neighbours, H entries in the head of a row, P rows met in
the lists of its columns, v candidates and p pairs.

A stage that runs `flop` operations on the tensor cores, moves `bytes`, issues `instructions` (of one lane
each) and whose rows wait for `chain` loads of a warp one after the other takes

    t = flop / (e F) + max(bytes / C, instructions / I, n / R chain L) + launches O

F, C: GEMM and copy ceilings; e: what of F a product with a filter behind it reaches; I: instructions of all
lanes a second; R: warps in flight; L: one load; O: one launch. Warps that wait for memory leave their turn to
others, hence the maximum; product and filter take turns, hence the sum. Random reads of less than a row of
features count 1 / rho of their bytes. e is least certain where rows are few: at 32,621 nearly every piece of
128 x 16 keys holds a hit, and at 2,000 cycles for such a piece and side, half of it hidden, e would be 0.55.
By row, unless a total is named:

    prepare   bytes D (4 b + 2): |x|^2 (b), hash (b), mean (b), rounding (b + 2);
              instructions 60 D
    scan      flop N W over a half ring, 2 N W in passes; instructions 4 N: each score meets both limits
    tighten   r = ceil(log2(N / 256)) rounds: bytes 24 c r: twice c read, c written; instructions 6 c S r
    rescore   bytes c (b D + 32) + 12 K; instructions 4 c D + 5 c S; chain 4 c / 16 D / 128
    encode    bytes 4 K + 4 K K / rho + m (8 + 4 h) / rho + 12 K + x b D + 48 E1;
              instructions 3 K K + 3 K h K + 4 x D; chain 10 + x (1 + D / 512)
    expand    bytes (2 * 4 + 8) k2 E1 / rho + 36 E2; instructions 15 k2 E1 k2 l + 2 E2 E2;
              chain 2 k2 ceil(E1 / 32) (l + 2), l = ceil(log2 E1)
    join      bytes 376 (E2 + H) + 10 P / rho + 16 P + 8192 + 12 v E2 / rho: radix sorts of 64-bit keys in 8
              passes, and 120 bytes around them; two walks over the lists; the table in L2, at twice C;
              instructions 230 P + 80 v E2 (200 for an atomic addition); chain 320
    dbscan    by radius: bytes 3 p (12 + 64 / rho) + 60; instructions 3 p 10 log2 N. Once: chain log2 N

Launches: 40 prepare, 3 r tighten, 100 join, 45 dbscan, else 20.

Between GPUs (450 GB/s each by NVLink up to 8, 50 GB/s beyond), bytes received by each as `cluster/sharded`
sends them, rows sharing nothing; s = G / 2 - 1 / 4 shards visit it in a half ring (odd G: (G - 1) / 2):

    ring      s n (b D + 16 + 12 K): rows, squares, limits; lists that come back. Hidden behind the scan
    encode    n (2 K (4 K + 4) + 8 K + x (b D + 12)): lists twice, half masks; features of members
    expand    n k2 (12 E1 + 4)
    join      n (20 E2 + 10 H + 12 P + 4 H + v (12 E2 + 4)): counts; heads; whole lists; candidates' rows
    dbscan    2 N (4 + 8) radii + 4 N radii + 8 N: degrees and labels, reduced; clusters; labels
    centroids n (b D + 8)

Each shard that visits is prepared too, and finds ever fewer new neighbours: c (1 + ln(1 + s)) are rescored.
Not modelled: partial waves of tiles, clocks that fall under load, rows that overflow, equal rows, the
reliability criterion, how many round trips a block takes.

Memory: features, their squares and lists, what the `plan_...` function of each kernel says, and on several
GPUs the visiting shard with its lists, and labels of all N rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
IMAGES = (32_621, 131_072, 1_000_000, 4_180_000, 10_000_000, 100_000_000)
WIDTHS = (512, 2048)
GPUS = (1, 8, 64, 256)
MEASURED_IMAGES, MEASURED_WIDTHS = (32_621, 131_072, 1_000_000), (128, 256, 512, 2048)
PLANNED = ("self_knn", "k_reciprocal", "jaccard_pairs", "dbscan")
OFF = 1.5  # a prediction further off than this factor is listed
RIVALS = ("matmul bfloat16", "matmul tf32", "matmul float32")
BYTES = {"float32": 4, "bfloat16": 2}

K, HALF, K2, SLOTS, RADII = 30, 16, 6, 256, 3
CANDIDATES = 34  # rescored, the most of `candidates.py` (results/candidates.json); 40 at most are kept
# Counted on the CPU at N = 16,384, D = 2048, on features drawn as in `timing.py`; at N = 8,192 and 32,621 and
# at D = 128 and 512 they differ by a few percent, x and p by up to a quarter. v: 8 candidates, and half as
# many again because rows share buckets. Random features have no pairs, and more rows to a column.
COUNTED = {
    "clustered": {"m": 25.4, "E1": 31, "E2": 122, "x": 5.8, "H": 65, "P": 2900, "v": 12, "p": 4.2},
    "random": {"m": 27.0, "E1": 27, "E2": 153, "x": 0, "H": 84, "P": 5400, "v": 8, "p": 0},
}
OPERATIONS = {
    "self_knn": ("prepare", "scan", "tighten", "rescore"),
    "k_reciprocal": ("encode", "expand"),
    "jaccard_pairs": ("join",),
    "dbscan": ("dbscan",),
    "pseudo_labels": ("prepare", "scan", "tighten", "rescore", "encode", "expand", "join", "dbscan"),
}
RHO = 0.5  # of the copy ceiling that random reads of some sectors of 32 bytes reach: assumed


@dataclass(frozen=True)
class Ceilings:
    """What the device can do.

    Attributes:
        gemm_tflops: bf16 product, 8192^3. copy_tb_s: bytes read and written.
        efficiency_passes, efficiency_ring: of the GEMM that the fused product reaches. Assumed, so that a
            half ring saves a factor of 1.7, not 2.
        instructions_t_s: 132 multiprocessors x 128 lanes x 1.7 GHz.
        warps_in_flight: 132 x 32, half of what there is room for: assumed, as are load_us and launch_us.
    """

    gemm_tflops: float = 800.0
    copy_tb_s: float = 3.0
    efficiency_passes: float = 0.80
    efficiency_ring: float = 0.70
    instructions_t_s: float = 28.7
    warps_in_flight: int = 132 * 32
    load_us: float = 0.5
    launch_us: float = 10.0
    nvlink_gb_s: float = 450.0
    network_gb_s: float = 50.0
    memory_gib: float = 80.0


@dataclass(frozen=True)
class Counts:
    """What a stage does on one GPU, all rows together but `chain`."""

    rows: float
    bytes: float
    instructions: float = 0.0
    flop: float = 0.0
    chain: float = 0.0
    launches: int = 20

    def seconds(self, ceilings: Ceilings, efficiency: float = 1.0) -> float:
        """The formula on top of the file."""
        return (
            self.flop / (efficiency * ceilings.gemm_tflops * 1e12)
            + max(
                self.bytes / (ceilings.copy_tb_s * 1e12),
                self.instructions / (ceilings.instructions_t_s * 1e12),
                self.rows / ceilings.warps_in_flight * self.chain * ceilings.load_us * 1e-6,
            )
            + self.launches * ceilings.launch_us * 1e-6
        )


def rounds_of(n: float) -> int:
    """Rounds of a scan of n columns: 256 first, then as many as all before."""
    return max(1, math.ceil(math.log2(max(n, 2) / 256)))


def scan_counts(
    rows: float, columns: float, d: int, b: int, ring: bool, slots: int, more: float = 1.0
) -> dict[str, Counts]:
    """The stages of the neighbour search, for `rows` queries among `columns`; `more` times c rescored."""
    wide, rounds = -(-d // 64) * 64, rounds_of(columns)
    return {
        "scan": Counts(rows, 0, 4 * rows * columns, (1 if ring else 2) * rows * columns * wide),
        "tighten": Counts(
            rows, 24 * CANDIDATES * rounds * rows, 6 * CANDIDATES * slots * rounds * rows, launches=3 * rounds
        ),
        "rescore": Counts(
            rows, (more * CANDIDATES * (b * d + 32) + 12 * K) * rows,
            more * CANDIDATES * (4 * d + 5 * slots) * rows, chain=more * 4 * CANDIDATES / 16 * d / 128,
        ),
    }  # fmt: skip


def prepare_counts(rows: float, d: int, b: int) -> Counts:
    """Squared lengths, hashes, mean and rounding."""
    return Counts(rows, d * (4 * b + 2) * rows, 60 * d * rows, launches=40)


def after_counts(rows: float, total: float, d: int, b: int, kind: str) -> dict[str, Counts]:
    """The stages after the neighbours, for `rows` of `total`."""
    c = COUNTED[kind]
    m, e1, e2, x, heads, met, v, p = (c[name] for name in ("m", "E1", "E2", "x", "H", "P", "v", "p"))
    search = math.ceil(math.log2(e1))
    look = math.log2(max(total, 2))
    encode = 4 * K + 4 * K * K / RHO + m * (8 + 4 * HALF) / RHO + 12 * K + x * b * d + 48 * e1
    join = 376 * (e2 + heads) + 10 * met / RHO + 16 * met + 8192 + 12 * v * e2 / RHO
    return {
        "encode": Counts(rows, encode * rows, (3 * K * K + 3 * K * HALF * K + 4 * x * d) * rows,
                         chain=10 + x * (1 + d / 512)),
        "expand": Counts(rows, (16 * K2 * e1 / RHO + 36 * e2) * rows,
                         (15 * K2 * e1 * K2 * search + 2 * e2 * e2) * rows,
                         chain=2 * K2 * math.ceil(e1 / 32) * (search + 2)),
        "join": Counts(rows, join * rows, (230 * met + 80 * v * e2) * rows, chain=320, launches=100),
        "dbscan": Counts(rows, RADII * (3 * p * (12 + 64 / RHO) + 60) * rows,
                         RADII * 3 * p * 10 * look * rows, chain=look, launches=15 * RADII),
    }  # fmt: skip


def visits(gpus: int) -> float:
    """Shards that visit a GPU in the half ring."""
    return (gpus - 1) / 2 if gpus % 2 else gpus / 2 - 0.25


def network_bytes(n: float, d: int, b: int, gpus: int) -> dict[str, float]:
    """Bytes that each GPU receives from the others, by step."""
    if gpus == 1:
        return {}
    rows, c = n / gpus, COUNTED["clustered"]
    by_row = {
        "ring": visits(gpus) * (b * d + 16 + 12 * K),
        "encode": 2 * K * (4 * K + 4) + 8 * K + c["x"] * (b * d + 12),
        "expand": K2 * (12 * c["E1"] + 4),
        "join": 20 * c["E2"] + 14 * c["H"] + 12 * c["P"] + c["v"] * (12 * c["E2"] + 4),
        "centroids": b * d + 8,
    }
    elsewhere = (gpus - 1) / gpus  # whom a row needs may be at hand
    found = {step: rows * count * (1 if step == "ring" else elsewhere) for step, count in by_row.items()}
    return found | {"dbscan": (2 * (4 + 8) * RADII + 4 * RADII + 8) * n}


def communication(n: float, d: int, b: int, gpus: int, ceilings: Ceilings) -> dict[str, float]:
    """Seconds a GPU's link is busy: around the ring, while the scan runs, and after it."""
    link = (ceilings.nvlink_gb_s if gpus <= 8 else ceilings.network_gb_s) * 1e9
    received = network_bytes(n, d, b, gpus)
    ring = received.get("ring", 0.0)
    return {"ring": ring / link, "exchange": (sum(received.values()) - ring) / link}


def memory_of(n: float, d: int, dtype: str, gpus: int, ceilings: Ceilings) -> dict[str, Any]:
    """Bytes a GPU holds at most in each operation, by the plans of the kernels.

    Returns:
        `held`: features and squares; an entry an operation, None once one did not fit; `passes` of the
        search, 1 for a half ring; `fits`.
    """
    from dmx.kernels.cross import plan_cross
    from dmx.kernels.dbscan import plan_dbscan
    from dmx.kernels.jaccard import plan_jaccard
    from dmx.kernels.k_reciprocal import plan_k_reciprocal
    from dmx.kernels.knn import plan_knn
    from dmx.kernels.memory import NotEnoughMemory

    rows, b, c = math.ceil(n / gpus), BYTES[dtype], COUNTED["clustered"]
    held = rows * (b * d + 8)
    visitor = rows * (b * d + 16 + 2 * 12 * K) if gpus > 1 else 0  # with both sides' lists
    entries, pairs = round(c["E2"] * rows), round(c["p"] * rows)
    found: dict[str, Any] = {"held": held, "passes": None, "fits": True}

    def search(free: int) -> Any:
        return plan_knn(None, rows, d, K, free) if gpus == 1 else plan_cross(rows, rows, d, K, free)

    room = int(ceilings.memory_gib * 2**30) - held
    for name, kept, plan in (
        ("self_knn", visitor, search),
        ("k_reciprocal", 12 * K * rows, lambda free: plan_k_reciprocal(rows, K, K2, free)),
        ("jaccard_pairs", 12 * entries, lambda free: plan_jaccard(rows, entries, free_bytes=free)),
        ("dbscan", 12 * pairs, lambda free: plan_dbscan(int(n), pairs, RADII, free)),
    ):
        found[name] = None
        if not found["fits"]:
            continue
        try:
            planned = plan(max(room - kept, 0))
        except NotEnoughMemory:
            found["fits"] = False
            continue
        found[name] = held + kept + planned.peak_bytes
        if name == "self_knn":
            found["passes"] = planned.passes
    return found


def predict(
    n: float, d: int, dtype: str = "float32", kind: str = "clustered", gpus: int = 1, ring: bool = True,
    ceilings: Ceilings | None = None,
) -> dict[str, float]:  # fmt: skip
    """Seconds of every stage on each of `gpus` GPUs; `total` lets the ring of blocks hide behind the scan."""
    known, b, rows = ceilings or Ceilings(), BYTES[dtype], n / gpus
    guests = visits(gpus) if gpus > 1 else 0.0
    counts = {"prepare": prepare_counts(rows * (1 + guests), d, b)}
    counts |= scan_counts(rows, n, d, b, ring, SLOTS, 1 + math.log1p(guests))
    counts |= after_counts(rows, n, d, b, kind)
    efficiency = {"scan": known.efficiency_ring if ring else known.efficiency_passes}
    seconds = {name: count.seconds(known, efficiency.get(name, 1.0)) for name, count in counts.items()}
    links = communication(n, d, b, gpus, known)
    total = sum(seconds.values()) + max(links["ring"] - seconds["scan"], 0) + links["exchange"]
    return {**seconds, **links, "total": total}


def operations(seconds: dict[str, float]) -> dict[str, float]:
    """The same by function, as they can be timed."""
    return {name: sum(seconds[stage] for stage in stages) for name, stages in OPERATIONS.items()}


def predict_queries(queries: float, n: float, d: int, dtype: str, ceilings: Ceilings | None = None) -> float:
    """Seconds of `knn`: queries against other rows, which takes passes and prepares both."""
    known, b = ceilings or Ceilings(), BYTES[dtype]
    counts = {"prepare": prepare_counts(queries + n, d, b), **scan_counts(queries, n, d, b, False, SLOTS)}
    return sum(c.seconds(known, known.efficiency_passes) for c in counts.values())


def predict_rival(name: str, n: float, d: int, ceilings: Ceilings | None = None) -> float | None:
    """Seconds of chunked `torch.matmul` and `topk`; scores are written once and, assumed, read 5 times."""
    known = ceilings or Ceilings()
    share = {"matmul bfloat16": (1.0, 2), "matmul tf32": (0.5, 4), "matmul float32": (1 / 15, 4)}.get(name)
    if share is None:
        return None
    rate, size = share
    return 2 * n * n * d / (rate * known.gemm_tflops * 1e12) + 6 * size * n * n / (known.copy_tb_s * 1e12)


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Four digits of every number with a fraction: more would promise what a model cannot keep."""
    return {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in values.items()}


def prediction(n: int, d: int, gpus: int, ceilings: Ceilings) -> dict[str, Any]:
    """A row of the table of predictions, float32 features of people."""
    memory = memory_of(n, d, "float32", gpus, ceilings)
    ring = memory["passes"] in (1, None) or gpus > 1  # several GPUs meet in a half ring, passes or not
    seconds = predict(n, d, gpus=gpus, ring=ring, ceilings=ceilings)
    return {"n": n, "d": d, "gpus": gpus, "ring": ring, "seconds": rounded(seconds), "memory_bytes": memory,
            "network_bytes": rounded(network_bytes(n, d, BYTES["float32"], gpus))}  # fmt: skip


def benchmark_row(n: int, d: int, kind: str, dtype: str, ceilings: Ceilings) -> dict[str, Any]:
    """What `gpu.py` compares its rows with."""
    seconds = predict(n, d, dtype, kind, ceilings=ceilings)
    queries = predict_queries(min(8192, n), n, d, dtype, ceilings)
    rivals = {name: predict_rival(name, n, d, ceilings) for name in RIVALS}
    return {
        "n": n, "d": d, "kind": kind, "dtype": dtype, "stages": rounded(seconds),
        "operations": rounded({**operations(seconds), "knn": queries}), "rivals": rounded(rivals),
    }  # fmt: skip


def compared(rows: Sequence[dict[str, Any]], benchmark: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `gpu.py` beside these predictions: n, d, kind, dtype, stage, predicted_s, measured_s, ratio."""
    found = []
    for row in rows:
        for entry in benchmark:
            same = all(entry[key] == row[key] for key in ("n", "d", "kind", "dtype"))
            if same and row["stage"] in entry["operations"] and row["seconds"]:
                expected = entry["operations"][row["stage"]]
                pair = {key: row[key] for key in ("n", "d", "kind", "dtype", "stage")}
                pair |= {"predicted_s": expected, "measured_s": row["seconds"]}
                found.append({**pair, "ratio": row["seconds"] / expected})
    return found


def build(ceilings: Ceilings, source: str, measurements: dict[str, Any]) -> dict[str, Any]:
    """All predictions, and the measurements they are to be compared with, if there are any."""
    benchmark = [
        benchmark_row(n, d, kind, dtype, ceilings)
        for n in MEASURED_IMAGES for d in MEASURED_WIDTHS for kind in COUNTED for dtype in BYTES
    ]  # fmt: skip
    pairs = [] if measurements.get("gpu") is None else compared(measurements["rows"], benchmark)
    off = [pair for pair in pairs if not 1 / OFF <= pair["ratio"] <= OFF]
    return {
        "ceilings": {"source": source, **asdict(ceilings)}, "counted": COUNTED,
        "predictions": [prediction(n, d, g, ceilings) for n in IMAGES for d in WIDTHS for g in GPUS],
        "benchmark": benchmark,
        "measurements": [rounded(pair) for pair in pairs] or None,
        "off": [rounded(pair) for pair in off] if pairs else None,
        "verdict": (
            f"{len(off)} of {len(pairs)} measured rows are off by more than {OFF}x" if pairs
            else "no GPU has been measured: nothing says yet how far these predictions are off"
        ),
    }  # fmt: skip


def show(results: dict[str, Any]) -> None:
    """The predictions as a table, and what is off."""
    names = ("scan", "search", "after", "links", "total s", "GiB a GPU")
    print(f"{'images':>12} {'width':>5} {'GPUs':>4}" + "".join(f"{name:>10}" for name in names))
    for row in results["predictions"]:
        s, memory = row["seconds"], row["memory_bytes"]
        search = sum(s[stage] for stage in OPERATIONS["self_knn"])
        after = s["encode"] + s["expand"] + s["join"] + s["dbscan"]
        note = "" if row["ring"] else "  in passes"
        figures = "".join(f"{t:>10.3g}" for t in (s["scan"], search, after, s["exchange"], s["total"]))
        print(f"{row['n']:>12,} {row['d']:>5} {row['gpus']:>4}{figures}{gib(memory):>10}{note}")
    print(results["verdict"])
    for pair in results["off"] or ():
        print(f"  {pair['stage']} {pair['n']:,} x {pair['d']} {pair['kind']} {pair['dtype']}: "
              f"predicted {pair['predicted_s']:.3g} s, measured {pair['measured_s']:.3g} s")  # fmt: skip


def gib(memory: dict[str, Any]) -> str:
    """The largest of a prediction's memory figures, in GiB."""
    if not memory["fits"]:
        return "too much"
    return f"{max(memory[name] for name in PLANNED) / 2**30:.1f}"


def main() -> None:
    """Predict, compare, print, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ceilings", type=Path, help="results of gpu.py whose ceilings to take")
    parser.add_argument("--measured", type=Path, default=RESULTS / "gpu.json", help="results to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS / "model.json")
    arguments = parser.parse_args()
    ceilings, source = Ceilings(), "assumed for one H100"
    if arguments.ceilings:
        given = json.loads(arguments.ceilings.read_text(encoding="utf-8"))
        if given["gpu"] is None:
            parser.error(f"{arguments.ceilings}: holds no measured ceilings ({given['reason']})")
        ceilings = Ceilings(given["ceilings"]["gemm_tflops"], given["ceilings"]["copy_tb_s"])
        source = f"measured on {given['gpu']['name']}"
    measurements = {}
    if arguments.measured.exists():
        measurements = json.loads(arguments.measured.read_text(encoding="utf-8"))
    results = build(ceilings, source, measurements)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()
