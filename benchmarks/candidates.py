"""How many candidates a row the error bound leaves, by the type of the factors: counted on the CPU.

    python benchmarks/candidates.py

For some rows all keys are computed from factors rounded to float16 or bfloat16, the bound of
`kernels/candidates.py` is put around the k-th best, and what reaches it is counted: kept by the buffers
(2.02 E below) and rescored in float64 (1.01 E below). Features as in the benchmark of the GPU (`timing.py`).
Not centred, which these need not be. Writes benchmarks/results/candidates.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from timing import features

RESULT = Path(__file__).parent / "results" / "candidates.json"
SHAPES = ((32_621, 2048), (32_621, 512), (131_072, 2048))
NEIGHBOURS, CHUNK = 29, 8192


def count(x: torch.Tensor, kind: str, dtype: torch.dtype, rows: int) -> dict[str, object]:
    """Candidates of the first rows among all of x, (N, D) unit rows."""
    n, d = x.shape
    queries = x[:rows]
    low, keys, worst = queries.to(dtype), [], 0.0
    for part in x.split(CHUNK):
        rounded = part.to(dtype)
        worst = max(worst, float((part - rounded.float()).norm(dim=1).max()))
        keys.append(low.float() @ rounded.float().T)
    key = torch.cat(keys, 1)
    key[torch.arange(rows), torch.arange(rows)] = -2
    error = (queries - low.float()).norm(dim=1) * (1 + worst) + worst + (d + 8) * 2.0**-22
    best = key.topk(NEIGHBOURS, dim=1).values[:, -1]
    kept = (key >= (best - 2.02 * error)[:, None]).sum(1).float()
    rescored = (key >= (best - 1.01 * error)[:, None]).sum(1).float()
    return {
        "images": n, "width": d, "features": kind,
        "factors": str(dtype).removeprefix("torch."), "rows": rows, "error": float(error.mean()),
        "kept": float(kept.mean()), "most_kept": int(kept.max()), "rescored": float(rescored.mean()),
    }  # fmt: skip


def main() -> None:
    """Counts all shapes, prints the rows and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="rows counted (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    found = []
    for n, d in SHAPES:
        for kind in ("clustered", "random"):
            x = features(n, d, kind, "float32", torch.device("cpu"), seed=0)
            found += [count(x, kind, dtype, args.rows) for dtype in (torch.float16, torch.bfloat16)]
    for row in found:
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in row.values()), sep="\t")
    args.out.write_text(json.dumps({"neighbours": NEIGHBOURS, "counts": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
