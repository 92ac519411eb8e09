"""Every Triton kernel, compiled ahead of time for an A100, an H100 and a B200, without a GPU.

What the compiler made of it is read back: registers a thread, spilled bytes, shared memory, and the matrix
instruction where there should be one. Run as a script, this file compiles and prints JSON; the test does so
in a process of its own, because its own process interprets (see tests/conftest.py).

One function an operation lists its builds, with the limits that were read off and why they matter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# Triton 3.6 fails to split a tile that lies in the tensor memory of an sm_100; 3.9 does it.
TARGETS = (80, 90, 100) if version("triton") >= "3.9" else (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel and what it may take.

    `signature` names the arguments that are not constants, as Triton types ("*fp32", "*i64", "i32"); those in
    `aligned` are divisible by 16, as torch's allocations and padded widths are.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    registers: (
        int | dict[int, int]
    )  # the most a thread may use, on any target or on each that it is built for
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    maxnreg: int | dict[int, int] | None = None  # as the launcher asks for, everywhere or on some targets
    instruction: dict[int, str] = field(default_factory=dict)  # target -> what its PTX has to contain

    @property
    def limits(self) -> dict[int, int]:
        """The most registers on every target."""
        if isinstance(self.registers, int):
            return dict.fromkeys(TARGETS, self.registers)
        return {target: limit for target, limit in self.registers.items() if target in TARGETS}


def knn() -> list[Build]:
    """Every configuration of the scan: half ring, passes, between two sets; what prepares and finishes it.

    128 registers a thread let two blocks of 256 threads share a multiprocessor of an H100 (65,536 registers).
    """
    from dmx.kernels import candidates, distinct, exact, rescore, similarity, unit_rows

    found = []
    pointers = {
        "rows": "*fp16", "others": "*fp16", "row_offset": "*fp32", "other_offset": "*fp32",
        "limits": "*fp32", "buffers": "*i64", "counts": "*i32",
        "column_limits": "*fp32", "column_buffers": "*i64", "column_counts": "*i32",
    }  # fmt: skip
    numbers = ("first_row", "row_tiles", "first_diagonal", "diagonals", "blocks", "W")
    tensor_cores = {80: "mma", 90: "wgmma", 100: "tcgen05"}
    limits = ({80: 200, 90: 128, 100: 128}, {90: 192, 100: 192}, {90: 128, 100: 128}, {90: 224, 100: 192})
    for config, registers in zip(candidates.SCAN_CONFIGS, limits, strict=True):
        for form in ("ring", "pass", "cross"):
            constants = {
                "RING": form == "ring", "BY_ROW": True, "BY_COLUMN": form != "pass", "OWN": form != "cross", 
                "CAPACITY": 256, "BLOCK": 256, "ROWS": config.rows, "COLUMNS": config.columns,
                "DEPTH": config.depth, "GROUP": config.group, "PIECE": config.piece,
            }  # fmt: skip
            tile = f"{config.rows}x{config.columns}_{config.piece}_{config.warps}"
            found.append(
                Build(f"scan_{tile}_{form}", candidates._scan,
                      pointers | dict.fromkeys(numbers, "i32"), constants, config.warps, registers,
                      config.stages, ("W",), dict.fromkeys((90, 100), config.registers), tensor_cores),
            )  # fmt: skip
    for capacity in (256, 512):
        constants = {"K": 30, "CAPACITY": capacity, "CHUNK": candidates._CHUNK}
        found.append(
            Build(f"tighten_{capacity}", candidates._tighten,
                  {"buffers": "*i64", "counts": "*i32", "limits": "*fp32", "base": "*fp64",
                   "ROUNDING": "fp32"},
                  constants, capacity // 64, 144),
        )  # fmt: skip
        found.append(
            Build(f"select_{capacity}", rescore._select,
                  {"ids": "*i32", "steps": "*i64", "counts": "*i32", "targets": "*i32", "out_ids": "*i32",
                   "out_steps": "*i64", "stride": "i64"},
                  constants | {"CHUNK": rescore._CHUNK}, capacity // 64, 128),
        )  # fmt: skip
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        found += [
            Build(f"rescore_{dtype}", rescore._rescore,
                  {"queries": f"*{dtype}", "query_squares": "*fp64", "features": f"*{dtype}",
                   "squares": "*fp64", "query_ids": "*i32", "column_ids": "*i32", "visit": "*i32",
                   "packed": "*i64", "counts": "*i32", "constants": "*fp64", "base": "*fp64",
                   "ids": "*i32", "steps": "*i64", "left": "*i32", "D": "i32", "ROUNDING": "fp32"},
                  {"K": 30, "CAPACITY": 256, "MANY": rescore._RESCORED, "BLOCK": 128}, 4, 168,
                  aligned=("D",)),
            Build(f"scan_exact_{dtype}", exact._scan_exact,
                  {"queries": f"*{dtype}", "query_squares": "*fp64", "features": f"*{dtype}",
                   "squares": "*fp64", "rows": "*i32", "columns": "*i32", "ids": "*i32",
                   "steps": "*i64", "counts": "*i32", "count": "i32", "begin": "i32", "end": "i32",
                   "k": "i32", "D": "i32"},
                  {"OWN": True, "CAPACITY": exact.CAPACITY, "TILE": exact._TILE, "DEPTH": exact._DEPTH},
                  8, 160, aligned=("D",), instruction={90: "mma"}),
            Build(f"squares_{dtype}", similarity._squares,
                  {"features": f"*{dtype}", "out": "*fp64", "D": "i32"}, {"BLOCK": 1024}, 4, 64, 3, ("D",)),
            Build(f"round_rows_{dtype}", unit_rows._round_rows,
                  {"features": f"*{dtype}", "squares": "*fp64", "ids": "*i32", "mean": "*fp32",
                   "low": "*fp16", "along_mean": "*fp64", "error": "*fp64", "length": "*fp64",
                   "count": "i32", "D": "i32", "W": "i32"},
                  {"BLOCK": 1024}, 4, 128, aligned=("D", "W")),
        ]  # fmt: skip
    for word in ("i16", "i32", "i64"):
        signature = {"words": f"*{word}", "out": "*i64", "D": "i32"}
        found.append(Build(f"hash_{word}", distinct._hash, signature, {"BLOCK": 1024}, 4, 64, 3, ("D",)))
    return found


def k_reciprocal() -> list[Build]:
    """Lists of 30 and of 64, features of every type, the usual and the widest expansion.

    Warps as the launcher gives them, a warp for 256 elements of a tile. At 32, 40, 48 and 64 registers a
    thread an SM holds 64, 48, 40 and 32 warps, and it holds no more than 32 programs.
    """
    from dmx.kernels import expansion, sparse
    from dmx.kernels import k_reciprocal as op

    found = []
    lists = {"own": "*i32", "places": "*i32", "lists": "*i32", "full": "*i64", "half": "*i64"}
    rows = {"added": "*i32", "counts": "*i32"}
    near = {"own": "*i32", "similarities": "*fp64", "full": "*i64"}
    members = {"members": "*i32", "weights": "*fp64", "sizes": "*i32"}
    for k, h, padded, padded_half in ((30, 16, 32, 16), (64, 33, 64, 64)):
        added = k * ((h - 1) // 3)
        shape = {"K": k, "KP": padded}
        room = {"ADDED": added, "WIDTH": k + added, "BLOCK": op._ROW_BLOCK}
        found += [
            Build(f"mutual_{k}", op._mutual, lists, shape | {"H": h}, op._warps(padded * padded), 32),
            Build(f"additions_{k}", op._additions, lists | rows,
                  shape | {"H": h, "HP": padded_half, "WIDTH": added}, op._warps(padded * padded_half), 48),
            Build(f"members_{k}", op._members, near | rows | members, shape | room,
                  op._warps(padded * op._ROW_BLOCK), 48),
        ]  # fmt: skip
    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        signature = {"features": f"*{dtype}", "squares": "*fp64", "numbers": "*i64", "starts": "*i64",
                     "others": f"*{dtype}", "other_squares": "*fp64", "D": "i32"}  # fmt: skip
        shape = {"BLOCK": op._FEATURE_BLOCK}
        found.append(Build(f"weigh_{dtype}", op._weigh, signature | members, shape, 1, 64, aligned=("D",)))
    csr = {"starts": "*i64", "columns": "*i32", "values": "*fp64"}
    to = {"to_starts": "*i64", "to_columns": "*i32", "to_values": "*fp64"}
    shape = {"BLOCK": sparse._ROW_BLOCK}
    found.append(Build("order", sparse._order, csr | to | {"sizes": "*i32"}, shape, 1, 56))
    op = expansion
    for near_k, registers in ((6, 64), (64, 80)):
        signature = {"lists": "*i32", "begin": "i32", **csr}
        shape = {"LISTS": near_k, "GROUP": op._LIST_GROUP, "BLOCK": op._ENTRY_BLOCK}
        limits = {"num_warps": op._AVERAGE_WARPS, "registers": registers, "maxnreg": op._AVERAGE_REGISTERS}
        found += [
            Build(f"average_{near_k}_count", op._average, signature | {"counts": "*i32"},
                  shape | {"FILL": False} | dict.fromkeys(to), **limits),
            Build(f"average_{near_k}_fill", op._average, signature | to,
                  shape | {"FILL": True, "counts": None}, **limits),
        ]  # fmt: skip
    return found


def jaccard() -> list[Build]:
    from dmx.kernels import jaccard as op

    heads = {"starts": "*i64", "ranks": "*i32"}
    lists = {"weights": "*i16", "head_starts": "*i64", "list_starts": "*i64", "list_rows": "*i32",
             "list_weights": "*i16", "after": "*i64"}  # fmt: skip
    out = {"tables": "*i32", "counter": "*i64", "counts": "*i32", "keys": "*i64"}
    numbers = dict.fromkeys(("first", "last", "buckets", "slots", "enough", "steps"), "i32") | {"room": "i64"}
    join = {"HEADS": op._HEADS, "WIDTH": op._WIDTH, "PROBES": op._PROBES}
    pairs = {"starts": "*i64", "columns": "*i32", "values": "*fp64", "keys": "*i64", "distances": "*fp64",
             "pairs": "i64", "steps": "i32"}  # fmt: skip
    verify = {"PAIRS": op._PAIRS, "ENTRIES": op._ENTRIES}
    return [
        Build("candidates", op._candidates, heads | lists | out | numbers, join, op._JOIN_WARPS, 80,
              maxnreg=op._REGISTERS),
        Build("verify", op._verify, pairs, verify, op._VERIFY_WARPS, 64),
    ]  # fmt: skip


def dbscan() -> list[Build]:
    """For 2^31 pairs and more, where places are int64."""
    from dmx.kernels import dbscan as op

    pairs = {"starts": "*i64", "indices": "*i32", "distances": "*fp64", "radii": "*fp64"}
    sizes = {"rows": "i32", "steps": "i32", "pairs": "i64"}
    block = {"BLOCK": op._BLOCK}
    degree, labels, core = {"degree": "*i32"}, {"labels": "*i64"}, {"min_samples": "i32"}
    # A multiprocessor runs 32 programs at most: 64 registers a thread do not keep it from that.
    return [
        Build("degrees", op._degrees, pairs | degree | sizes, block, op._WARPS, 64),
        Build("union", op._union, pairs | degree | {"parent": "*i32"} | sizes | core, block, op._WARPS, 64),
        Build("flatten", op._flatten, {"parent": "*i32", "rows": "i32"}, block, op._WARPS, 64),
        Build("borders", op._borders, pairs | degree | labels | sizes | core, block, op._WARPS, 64),
    ]  # fmt: skip


def builds() -> list[Build]:
    return [*knn(), *k_reciprocal(), *jaccard(), *dbscan()]


def compiled(build: Build, target: int) -> dict[str, Any]:
    """Compiles and reads back what the assembler says of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in names
             if name in build.aligned or build.signature.get(name, "").startswith("*")}  # fmt: skip
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    source = ASTSource(fn=build.kernel, signature=signature, constexprs=build.constants, attrs=attrs)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    maxnreg = build.maxnreg.get(target) if isinstance(build.maxnreg, dict) else build.maxnreg
    if maxnreg:
        options["maxnreg"] = maxnreg
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "name": build.name,
        "target": target,
        "registers": int(registers),
        "stack": int(stack),  # bytes a thread, where spilled registers go
        "shared": kernel.metadata.shared,
        "instructions": sorted(set(re.findall(r"\b(?:wgmma|tcgen05|mma)\b", kernel.asm["ptx"]))),
    }


def main() -> None:
    wanted = [(build, target) for build in builds() for target in build.limits]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        print(json.dumps(list(pool.map(lambda pair: compiled(*pair), wanted))))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {(row["name"], row["target"]): row for row in json.loads(done.stdout)}


@pytest.mark.parametrize(
    ("build", "target"),
    [
        pytest.param(build, target, id=f"{build.name}-{target}")
        for build in builds()
        for target in build.limits
    ],
)
def test_compiles_within_its_limits(build: Build, target: int, report: dict[tuple[str, int], Any]) -> None:
    found = report[build.name, target]
    assert found["stack"] == 0, "registers spill to memory"
    assert found["registers"] <= build.limits[target]
    assert found["shared"] <= SHARED_LIMIT[target]
    if target in build.instruction:
        assert build.instruction[target] in found["instructions"]


if __name__ == "__main__":
    main()
