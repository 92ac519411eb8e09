"""Candidates for nearest neighbours: a float16 product fused with a filter that provably misses nobody.

For a fixed row i, ordering j by similarity is ordering by (see `unit_rows.py`)

    key(i, j) = <u_i, u_j> + a_j

The product is taken on the tensor cores, from factors rounded to float16. A computed key c is off from
s(i, j) less what depends on i alone, s as `similarity.py` defines it, by at most E_i(c) = base_i + r |c|,

    base_i = e_i (max_j |u_j| + max_j e_j) + |u_i| max_j e_j     rounding of the factors, e as measured
           + (D + 8) 2^-22 |u_i| max_j |u_j|                     summation in float32 that may truncate
           + r max_j |a_j| + 2^-21 (1 + max_j |a_j|) w           rounding of a_j and of the sum
           + 2^-45 + (D + 8) 2^-52                               rounding of s to its grid; float64
    r      = 2^-24,   w = |u_i| max_j |u_j| + max_j |a_j|

If c_k is the k-th largest computed key of row i over any set of columns, no true neighbour has a computed key
below the limit c_k - 2.02 E_i(c_k).

Method: known limit, then append. Keys that reach their row's limit go into the row's buffer; no key is
written otherwise. Columns come in rounds, each as many as all before. After a round `_tighten` ranks every
buffer, raises the limit to what it proves and drops what is below. Rows are shuffled, so about as many keys
pass in a round as were kept before it, whatever the data. A row whose buffer overflows is given up
(count > capacity) for `exact.py`.

A self-join is a half ring: block I meets blocks I, I + 1, ..., I + B / 2 (mod B), and every key is tested
against the limits of its row and of its column. A round is a band of the ring, so that all rows have seen
equally many columns. The first band of two blocks is tested one side after the other, since it would
triple what was seen.

Shapes: rows (P, W) float16; buffers (P, capacity) int64, counts (P,) int32.
Memory: 8 capacity + 12 bytes a row. Time: 2 P Q W operations on the tensor cores, half for a self-join.
Source: the error of tensor cores, Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor
cores", PeerJ Computer Science 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dmx.kernels.device import on
from dmx.kernels.unit_rows import UnitRows

BLOCK = 256  # rows of a ring block; tiles divide it
_GRID = 2**30  # most programs of a launch: their numbers fit into int32
_CHUNK = 16  # keys that all of a row are compared with at a time: 32 comparisons a thread
_LOWEST = -3.0e38  # a limit that every key reaches, but not the -inf of padding
ROUNDING = 2.0**-24  # r


def keys_reference(rows: torch.Tensor, others: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """key(i, j) in float64, from unit rows (Q, D) and (M, D) and the mean (D,) -> (Q, M)."""
    along = others @ mean
    return (rows - mean) @ (others - mean).T + along - along.mean()


@dataclass(frozen=True)
class ScanConfig:
    """Tile of the product and how it is run.

    Attributes:
        rows, columns, depth: of a tile; rows and columns divide BLOCK, depth divides `unit_rows.WIDTH`.
        piece: columns that are filtered at a time; fewer take fewer registers and more barriers.
        group: row tiles that are walked together, so that their columns are met in the L2 cache.
        warps, stages: as Triton takes them.
        registers: the most a thread may have on an H100 and later; None leaves it to the assembler.
    """

    rows: int
    columns: int
    depth: int
    piece: int
    group: int
    warps: int
    stages: int
    registers: int | None = None


# The first is what runs; `benchmarks/gpu.py --tune` tries the others.
SCAN_CONFIGS = (
    # With 128 registers a thread two blocks fit on a multiprocessor: one filters, one multiplies. Left alone,
    # Triton 3.6 may take more; it has no need to, and spills nothing.
    ScanConfig(rows=128, columns=128, depth=64, piece=16, group=16, warps=8, stages=3, registers=128),
    # Half the barriers in the filter, but about 180 registers: one block on a multiprocessor.
    ScanConfig(rows=128, columns=128, depth=64, piece=32, group=16, warps=8, stages=4),
    # Fewer hits a piece, so fewer turns of the filter, for twice as many looks.
    ScanConfig(rows=128, columns=128, depth=64, piece=8, group=16, warps=8, stages=3, registers=128),
    # The widest instruction, least shared memory traffic, and nothing to hide the filter behind.
    ScanConfig(rows=128, columns=256, depth=64, piece=16, group=16, warps=8, stages=4),
)
_scan_config = SCAN_CONFIGS[0]


def scan_config() -> ScanConfig:
    """The configuration scans run with."""
    return _scan_config


def use_scan_config(config: ScanConfig) -> None:
    """Makes all later scans of this process run with `config`."""
    global _scan_config
    _scan_config = config


def capacity_for(k: int) -> int:
    """Slots of a row's buffer: about three times what is kept and as many new, for keys that lie closer."""
    return 256 if k <= 32 else 512


@triton.jit
def ordered(bits):  # type: ignore[no-untyped-def]
    """float32 bits as int32 that compare like the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _drain(  # type: ignore[no-untyped-def]
    tile, shift, limit, owner, other, buffers, counts, CAPACITY: tl.constexpr, AXIS: tl.constexpr
):
    """Appends what reaches its owner's limit, one key an owner and turn; owners lie across `AXIS`.

    Turns go by the other's number. A tile has few hits, so few turns; nothing in them is as large as the tile
    but comparisons, so the accumulators stay where the product left them.
    """
    others = tl.expand_dims(other, 1 - AXIS)
    key = tile + tl.expand_dims(shift, 1 - AXIS)
    hit = key >= tl.expand_dims(limit, AXIS)
    total = tl.sum(hit.to(tl.int32), AXIS)
    turns = tl.max(total, 0)
    if turns > 0:
        # The slots of all turns at once: an addition that returns a value takes longer than all the rest.
        slot = tl.atomic_add(counts + owner, total, mask=total > 0, sem="relaxed")
        at = tl.min(tl.where(hit, others, 0x7FFFFFFF), AXIS)
        for turn in range(turns):
            found = tl.sum(tl.where(others == tl.expand_dims(at, AXIS), key, 0.0), AXIS)
            packed = (ordered(found.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | at.to(tl.int64)
            place = slot + turn
            fits = (turn < total) & (place < CAPACITY)
            tl.store(buffers + owner.to(tl.int64) * CAPACITY + place, packed, mask=fits)
            at = tl.min(tl.where(hit & (others > tl.expand_dims(at, AXIS)), others, 0x7FFFFFFF), AXIS)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of the columns. They lie in different registers: nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def _filter(  # type: ignore[no-untyped-def]
    tile, row, row_position, row_shift, row_limit, buffers, counts,
    first_column, offset, column_limits, column_buffers, column_counts,
    BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, OWN: tl.constexpr, CAPACITY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Keeps what reaches a limit, a piece of the columns at a time: most pieces have no hit at all."""
    if COLUMNS > PIECE:
        left, right = _halves(tile, ROWS, COLUMNS)
        _filter(left, row, row_position, row_shift, row_limit, buffers, counts,
                first_column, offset, column_limits, column_buffers, column_counts,
                BY_ROW, BY_COLUMN, OWN, CAPACITY, ROWS, COLUMNS // 2, PIECE)  # fmt: skip
        _filter(right, row, row_position, row_shift, row_limit, buffers, counts,
                first_column + COLUMNS // 2, offset, column_limits, column_buffers, column_counts,
                BY_ROW, BY_COLUMN, OWN, CAPACITY, ROWS, COLUMNS // 2, PIECE)  # fmt: skip
    else:
        column = first_column + tl.arange(0, COLUMNS)
        column_shift = tl.load(offset + column)
        if OWN:
            tile = tl.where(row_position[:, None] == column[None, :], float("-inf"), tile)
        if BY_ROW:
            hit = tile + column_shift[None, :] >= row_limit[:, None]
        if BY_COLUMN:
            column_limit = tl.load(column_limits + column)
            hit_column = tile + row_shift[:, None] >= column_limit[None, :]
            hit = hit | hit_column if BY_ROW else hit_column
        if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
            if BY_ROW:
                _drain(tile, column_shift, row_limit, row, column, buffers, counts, CAPACITY, 1)
            if BY_COLUMN:
                _drain(tile, row_shift, column_limit, column, row_position, column_buffers, column_counts,
                       CAPACITY, 0)  # fmt: skip


# What varies from launch to launch: a kernel for each kind of number would be compiled otherwise.
_VARYING = ["first_row", "row_tiles", "first_diagonal", "diagonals", "blocks"]


@triton.jit(do_not_specialize=_VARYING)
def _scan(  # type: ignore[no-untyped-def]
    rows, others, row_offset, other_offset, limits, buffers, counts,
    column_limits, column_buffers, column_counts, first_row, row_tiles, first_diagonal, diagonals, blocks, W,
    RING: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr, OWN: tl.constexpr,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    # Programs walk GROUP row tiles along all columns before the next GROUP.
    PARTS: tl.constexpr = BLOCK // COLUMNS
    span = diagonals * PARTS
    group = tl.program_id(0) // (GROUP * span)
    inside = tl.program_id(0) % (GROUP * span)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + inside % size
    diagonal = inside // size // PARTS
    part = inside // size % PARTS
    block = first_diagonal + diagonal
    if RING:
        block = (block + row_tile * ROWS // BLOCK) % blocks

    row = row_tile * ROWS + tl.arange(0, ROWS)  # of this pass, as the buffers are
    column = block * BLOCK + part * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left = rows + (first_row + row).to(tl.int64)[:, None] * W + depth[None, :]
    right = others + column.to(tl.int64)[None, :] * W + depth[:, None]
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(0, W, DEPTH):
        product = tl.dot(tl.load(left), tl.load(right), product)
        left += DEPTH
        right += DEPTH

    position = first_row + row
    _filter(product, row, position, tl.load(row_offset + position), tl.load(limits + row), buffers, counts,
            block * BLOCK + part * COLUMNS, other_offset, column_limits, column_buffers, column_counts,
            BY_ROW, BY_COLUMN, OWN, CAPACITY, ROWS, COLUMNS, PIECE)  # fmt: skip


@triton.jit
def _tighten(  # type: ignore[no-untyped-def]
    buffers, counts, limits, base, ROUNDING, K: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, CAPACITY)
    count = tl.load(counts + row)
    if count > CAPACITY:
        tl.store(limits + row, float("inf"))  # given up: take no more
    elif count >= K:
        held = slot < count
        packed = tl.load(buffers + row * CAPACITY + slot, mask=held, other=-0x8000000000000000)
        rank = tl.zeros([CAPACITY], tl.int32)
        for begin in range(0, count, CHUNK):
            some = begin + tl.arange(0, CHUNK)
            other = tl.load(buffers + row * CAPACITY + some, mask=some < count, other=-0x8000000000000000)
            rank += tl.sum((other[None, :] > packed[:, None]).to(tl.int32), 1)
        key = ordered((packed >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        best = tl.sum(tl.where(held & (rank == K - 1), key, 0.0), 0).to(tl.float64)
        error = tl.load(base + row) + ROUNDING * tl.abs(best)
        limit = tl.maximum((best - 2.02 * error).to(tl.float32), tl.load(limits + row))
        kept = held & (key >= limit)
        tl.debug_barrier()  # all is read before anything is written
        tl.store(buffers + row * CAPACITY + rank, packed, mask=kept)
        tl.store(counts + row, tl.sum(kept.to(tl.int32), 0))
        tl.store(limits + row, limit)


@dataclass(frozen=True)
class Candidates:
    """`packed[i, :counts[i]]` holds every neighbour of row i, best first; counts above capacity: given up.

    Attributes:
        packed: (P, capacity) int64: an ordered key above, below it 32 bits of position in `UnitRows`.
        counts: (P,) int32.
        rows: (R,) int32, what the rows are in their features.
        base: (R,) float64, base_i; constants: (R,) float64, s(i, j) - key(i, j).
    """

    packed: torch.Tensor
    counts: torch.Tensor
    rows: torch.Tensor
    base: torch.Tensor
    constants: torch.Tensor


def base_errors(rows: UnitRows, others: UnitRows) -> torch.Tensor:
    """base_i of the formula on top of the file, (M,) float64."""
    longest, worst = others.length.max(), others.error.max()
    shift = others.offset[: len(others)].abs().max().double()
    width = rows.low.shape[1] + 8
    size = rows.length * longest
    small = ROUNDING * shift + 2.0**-21 * (1 + shift) * (size + shift) + 2.0**-45 + width * 2.0**-52
    return rows.error * (longest + worst) + rows.length * worst + width * 2.0**-22 * size + small


class Scan:
    """The buffers of a search, and the launches that feed them."""

    def __init__(self, rows: UnitRows, others: UnitRows, mean: torch.Tensor, k: int, own: bool) -> None:
        self.rows, self.others, self.k, self.own = rows, others, k, own
        self.capacity = capacity_for(k)
        self.base = base_errors(rows, others)
        # An A100's matrix instruction leaves the product in more registers: held to 128, it would spill.
        hopper = rows.low.is_cuda and torch.cuda.get_device_capability(rows.low.device) >= (9, 0)
        self.most_registers = scan_config().registers if hopper else None
        self.lowest: torch.Tensor | None = None
        self.constants = rows.along_mean + others.along_mean.mean() - mean.double() @ mean.double()

    def __call__(self, begin: int, end: int) -> Candidates:
        """Candidates of rows [begin, end), from all columns. `begin` is a multiple of BLOCK."""
        self._start(begin, end)
        blocks = len(self.others.low) // BLOCK
        seen = 0
        while seen < blocks:
            more = max(1, min(seen, blocks - seen))
            self._launch(begin, seen, more, ring=False, by_row=True, by_column=False)
            seen += more
            self._tighten()
        return self._candidates(begin, end)

    def ring(self) -> Candidates:
        """Candidates of all rows of a self-join, every product computed once."""
        self._start(0, len(self.rows))
        blocks = len(self.rows.low) // BLOCK
        self._launch(0, 0, 1, ring=True, by_row=True, by_column=False)
        self._tighten()
        done, half = 1, blocks // 2  # diagonals done, and the last one
        while done <= half:
            if done == 1:
                for by_row in (True, False):
                    self._band(done, 1, blocks, by_row=by_row, by_column=not by_row)
                    self._tighten()
                done += 1
                continue
            # 2 done - 1 blocks were seen, and each diagonal adds two.
            more = min(max(1, done - 1), half + 1 - done)
            self._band(done, more, blocks, by_row=True, by_column=True)
            self._tighten()
            done += more
        return self._candidates(0, len(self.rows))

    def cross(self, columns: Scan, begin: int, end: int) -> Candidates:
        """Candidates of rows [begin, end), and of all columns for these rows, every product computed once.

        Both have limits already (`want`): no rounds are needed to find them.

        Args:
            columns: the search of the other side among these rows; its `begin_columns` has been called.
        """
        self._start(begin, end)
        blocks = len(self.others.low) // BLOCK
        self._launch(begin, 0, blocks, ring=False, by_row=True, by_column=True, columns=columns)
        self._tighten()
        columns._tighten()
        return self._candidates(begin, end)

    def begin_columns(self) -> None:
        """Buffers for all rows, to be fed by `cross` of the other side."""
        self._start(0, len(self.rows))

    def columns_found(self) -> Candidates:
        """What `cross` of the other side has found."""
        return self._candidates(0, len(self.rows))

    def want(self, least: torch.Tensor) -> None:
        """Start with the limits that similarities of at least `least` (M,) float64 prove."""
        key = least - self.constants
        limit = (key - 1.02 * (self.base + ROUNDING * key.abs())).float()
        self.lowest = torch.nextafter(limit, torch.full_like(limit, -torch.inf)).clamp(min=_LOWEST)

    def _band(self, first: int, diagonals: int, blocks: int, *, by_row: bool, by_column: bool) -> None:
        """Diagonals [first, first + diagonals). Blocks half a ring apart meet twice: once will do."""
        last = first + diagonals - 1
        if 2 * last == blocks:
            self._launch(0, last, 1, ring=True, by_row=by_row, by_column=by_column, rows=last * BLOCK)
            diagonals -= 1
        self._launch(0, first, diagonals, ring=True, by_row=by_row, by_column=by_column)

    def _candidates(self, begin: int, end: int) -> Candidates:
        of = slice(begin, end)
        return Candidates(self.buffers, self.counts, self.rows.ids[of], self.base[of], self.constants[of])

    def _start(self, begin: int, end: int) -> None:
        device, real = self.rows.low.device, end - begin
        rows = -(-real // BLOCK) * BLOCK
        self.real = real
        self.buffers = torch.empty((rows, self.capacity), dtype=torch.int64, device=device)
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.limits = torch.full((rows,), torch.inf, dtype=torch.float32, device=device)
        self.limits[:real] = _LOWEST if self.lowest is None else self.lowest[begin:end]
        self.pass_base = self.base[begin:end]

    def _launch(
        self, begin: int, first: int, diagonals: int, *, ring: bool, by_row: bool, by_column: bool,
        rows: int | None = None, columns: Scan | None = None,
    ) -> None:  # fmt: skip
        columns = columns or self
        config, low = scan_config(), self.others.low
        row_tiles = (len(self.counts) if rows is None else rows) // config.rows
        parts = BLOCK // config.columns
        most = max(1, _GRID // (max(row_tiles, config.group) * parts))
        with on(low):
            for start in range(first, first + diagonals, most):
                span = min(most, first + diagonals - start)
                _scan[(row_tiles * span * parts,)](
                    self.rows.low, low, self.rows.offset, self.others.offset, self.limits,
                    self.buffers, self.counts, columns.limits, columns.buffers, columns.counts,
                    begin, row_tiles, start, span, len(low) // BLOCK, low.shape[1],
                    RING=ring, BY_ROW=by_row, BY_COLUMN=by_column, OWN=self.own,
                    CAPACITY=self.capacity, BLOCK=BLOCK, ROWS=config.rows, COLUMNS=config.columns,
                    DEPTH=config.depth, GROUP=config.group, PIECE=config.piece,
                    num_warps=config.warps, num_stages=config.stages, maxnreg=self.most_registers,
                )  # fmt: skip

    def _tighten(self) -> None:
        with on(self.buffers):
            _tighten[(self.real,)](
                self.buffers, self.counts, self.limits, self.pass_base, ROUNDING,
                K=self.k, CAPACITY=self.capacity, CHUNK=_CHUNK, num_warps=self.capacity // 64,
            )  # fmt: skip
