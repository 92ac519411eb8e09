"""Jaccard distance of sparse rows that sum to 1, only for the pairs that are close.

    m(i, j) = sum over e of min(V(i, e), V(j, e))
    d(i, j) = round_12( 1 - m / (2 - m) )                  pairs i < j with d <= D = max_distance

Rows sum to 1, so sum max = 2 - m. round_12 rounds to 12 decimals: sums of a few hundred float64 numbers taken
in another order differ by about 1e-15, and on the decimal grid a pair that is tied with a threshold by
construction (duplicates, equal rows, d = 0.6 itself) falls on the same side whatever the order.

Method: an inverted index over the heads of the rows. Let m_min = 2 (1 - D) / (2 - D) be the m of D, and
T = 0.8 m_min. Order the columns by how many rows hold them, rare first, and cut every row into a head and a
tail of mass at most T (`heads.py`). Take the row of a pair whose head ends first in this order: what the two
share is in both heads, or in the tail of that row. So a pair with d <= D shares at least m_min - T in the
heads, and only such pairs are summed over their whole rows. Heads are rare columns: chance overlaps hardly
reach 0.2 m_min.

The heads are counted in whole numbers that are never too small, w(v) > 2^14 v, so that neither rounding nor
the order of additions matters. Row i adds min(w(i, e), w(j, e)) to bucket j mod B of a table, for every j > i
in the lists of its head. A bucket that several rows meet holds too much, never too little. A second walk over
the lists makes every j of a bucket that reached the bound a candidate, once: when it enters j in a hash table
or, where there is no room left, at the first column that j shares with i.

Shapes: V (N, N) CSR; pairs as CSR rows holding only columns j > i, ascending. d float64.
Error: |d - exact| <= 5e-13 (the rounding) + 1e-15.
Time: sum over columns of (rows with the column in their head)^2, and candidates times entries of a row. In
clustered sets of 8,000 rows with 40 to 128 entries, heads had 23 to 69 of them; a row made 440 to 3,500
additions for 20 to 1,900 rows, of which 7 to 20 became candidates and 2 to 20 were close.
Memory: 20 bytes an entry, 144 a row, the pass, and 24 bytes a pair.
Sources: Zhong et al., CVPR 2017, eq. 10; prefix filtering as in Bayardo, Ma and Srikant, "Scaling up all
pairs similarity search", WWW 2007.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dmx.kernels.cpu import jaccard as cpu
from dmx.kernels.device import on, pad_to_power_of_two, takes_triton
from dmx.kernels.heads import ENTRY_BYTES, ROW_BYTES, SORT_BYTES, WHOLE, Heads, find_heads, groups
from dmx.kernels.memory import Plan, free_bytes, require, split
from dmx.kernels.progress import counting
from dmx.kernels.similarity import nearest
from dmx.kernels.sparse import SparseRows, join_rows, starts_of

_TAIL = 0.8  # T / m_min: less makes heads longer, more lets chance overlaps through (0.5 to 0.9 simulated)
# The tables of running programs have to stay in the L2 cache: 6 a multiprocessor, 25 KiB each, are 20 MB on
# an H100. When a row meets 2,000, 4,096 buckets add a third to the candidates, 2,048 double them (simulated).
# Candidates, 10 to 40 a row, leave the slots nearly empty.
_BUCKETS, _SLOTS, _PROBES, _PROGRAMS = 4096, 2048, 8, 6
# 8 lists side by side, 128 bytes of each at a time: what is left of a list are 20 to 60 rows. 6 programs of 4
# warps leave 80 registers a thread; told so, the assembler spills none.
_HEADS, _WIDTH, _JOIN_WARPS, _REGISTERS = 8, 32, 4, 80
# Rows of about 100 entries are three steps of 32; two elements a lane keep as many searches under way.
_PAIRS, _ENTRIES, _VERIFY_WARPS = 8, 32, 4

_PAIR_BYTES = 12  # of the result, once more when its parts are joined
_PASS_BYTES = 80  # a candidate being summed and sorted: keys, distances, order, what the sort itself takes
_CANDIDATES = 64  # room a row
_MOST_ROWS = 2**18  # a pass: enough to keep every multiprocessor at work
_MOST_ENTRIES = 2**30  # torch sorts fewer than 2^31


def jaccard_reference(v: torch.Tensor) -> torch.Tensor:
    """The formula, dense: (N, N) rows that sum to 1 -> (N, N) float64 distances."""
    rows = v.double()
    m = torch.stack([torch.minimum(row, rows).sum(1) for row in rows])
    # Divided by a tensor: on a GPU torch divides by a number through its reciprocal.
    return torch.round((1 - m / (2 - m)) * 1e12).div(torch.full_like(m, 1e12)) + 0.0


@triton.jit
def _find(ranks, base, size, wanted, steps, asked):  # type: ignore[no-untyped-def]
    """Place of the first rank of a row that is not below `wanted`; steps: bits of the longest row."""
    low = tl.where(asked, 0, size)
    high = low + tl.where(asked, size, 0)
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(ranks + base + middle, mask=low < high, other=0) < wanted
        low = tl.where(below & (low < high), middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _head_tile(ranks, weights, list_starts, after, own, head, place, size):  # type: ignore[no-untyped-def]
    """Of entries of a head: w, and where and how many the rows are that follow in their lists."""
    held = place < size
    rank = tl.load(ranks + own + place, mask=held, other=0)
    weight = tl.load(weights + own + place, mask=held, other=0).to(tl.int32)
    begin = tl.load(after + head + place, mask=held, other=0)
    end = tl.load(list_starts + 1 + rank, mask=held, other=0)
    return weight, begin, (end - begin).to(tl.int32)


@triton.jit
def _add_heads(  # type: ignore[no-untyped-def]
    ranks, weights, list_starts, list_rows, list_weights, after, table, own, head, size, buckets,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The first walk of a row: adds what its head shares with others to their buckets."""
    column = tl.arange(0, WIDTH)[None, :]
    for t in range(0, size, HEADS):
        place = t + tl.arange(0, HEADS)
        weight, begin, left = _head_tile(ranks, weights, list_starts, after, own, head, place, size)
        for c in range(0, tl.max(left, 0), WIDTH):
            exists = c + column < left[:, None]
            at = begin[:, None] + c + column
            j = tl.load(list_rows + at, mask=exists, other=0)
            other = tl.load(list_weights + at, mask=exists, other=0).to(tl.int32)
            common = tl.minimum(other, weight[:, None])
            tl.atomic_add(table + (j & (buckets - 1)), common, mask=exists, sem="relaxed")


@triton.jit
def _claim(  # type: ignore[no-untyped-def]
    claims, slots, j, asked, HEADS: tl.constexpr, WIDTH: tl.constexpr, PROBES: tl.constexpr
):
    """Enters rows in a hash table: which lanes entered theirs, and which found PROBES slots taken by others.

    Slots are only ever filled, so all lanes with the same row come to the same end: one of them enters it and
    the others find it, or none finds room. There is no masked exchange: lanes that are done ask a cell of
    their own, side by side after the slots, whose answer nobody reads.
    """
    spare = slots + tl.arange(0, HEADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    first = j ^ (j >> 12)  # rows that share a bucket start at different slots
    new, open_, probe = asked & (j < 0), asked, 0
    while (probe < PROBES) & (tl.max(tl.max(open_.to(tl.int32), 1), 0) > 0):
        slot = tl.where(open_, (first + probe) & (slots - 1), spare)
        was = tl.atomic_cas(claims + slot, tl.where(open_, 0, -1), j + 1, sem="relaxed")
        new = new | (open_ & (was == 0))
        open_ = open_ & (was != 0) & (was != j + 1)
        probe += 1
    return new, open_


@triton.jit
def _met_before(ranks, starts, head_starts, own, place, j, asked, steps):  # type: ignore[no-untyped-def]
    """Whether the head of row j holds a column that this row has before `place` in its head."""
    base = tl.load(starts + j, mask=asked, other=0)
    begin = tl.load(head_starts + j, mask=asked, other=0)
    size = (tl.load(head_starts + 1 + j, mask=asked, other=0) - begin).to(tl.int32)
    met = asked & (j < 0)
    for t in range(0, tl.max(tl.max(tl.where(asked, place, 0), 1), 0)):
        wanted = tl.load(ranks + own + t)
        low = _find(ranks, base, size, wanted, steps, asked)
        found = tl.load(ranks + base + low, mask=asked & (low < size), other=-1) == wanted
        met = met | (found & (t < place))
    return met


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    starts, ranks, weights, head_starts, list_starts, list_rows, after, table, counter, keys,
    i, own, head, size, buckets, slots, enough, room, steps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """The second walk: appends every j of a bucket that holds `enough`, once. Returns how many."""
    count = 0
    column = tl.arange(0, WIDTH)[None, :]
    for t in range(0, size, HEADS):
        place = t + tl.arange(0, HEADS)
        _, begin, left = _head_tile(ranks, weights, list_starts, after, own, head, place, size)
        for c in range(0, tl.max(left, 0), WIDTH):
            exists = c + column < left[:, None]
            j = tl.load(list_rows + begin[:, None] + c + column, mask=exists, other=0)
            # Volatile: the additions took place in L2, and what lies in L1 may be older.
            held = tl.load(table + (j & (buckets - 1)), mask=exists, other=0, volatile=True)
            asked = exists & (held >= enough)
            if tl.max(tl.max(asked.to(tl.int32), 1), 0) > 0:
                new, open_ = _claim(table + buckets, slots, j, asked, HEADS, WIDTH, PROBES)
                if tl.max(tl.max(open_.to(tl.int32), 1), 0) > 0:
                    met = _met_before(ranks, starts, head_starts, own, place[:, None], j, open_, steps)
                    new = new | (open_ & (met == 0))
                ones = new.to(tl.int32)
                beside = tl.sum(ones, 1)
                total = tl.sum(beside, 0)
                if total > 0:  # most are in the table by now
                    slot = tl.atomic_add(counter, total.to(tl.int64), sem="relaxed")
                    to = slot + (tl.cumsum(beside, 0) - beside)[:, None] + tl.cumsum(ones, 1) - 1
                    tl.store(keys + to, (tl.cast(i, tl.int64) << 32) | j, mask=new & (to < room))
                    count += total
    return count


@triton.jit(do_not_specialize=["first", "last", "buckets", "slots", "enough", "room", "steps"])
def _candidates(  # type: ignore[no-untyped-def]
    starts, ranks, weights, head_starts, list_starts, list_rows, list_weights, after, tables, counter, counts,
    keys, first, last, buckets, slots, enough, room, steps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Candidates (i << 32 | j) of rows [first, last) in any order, and how many of each row.

    A program takes every num_programs-th row, one after the other. A row with long lists is one of many: all
    the rows in these lists have them too. So the work spreads over the programs by itself.
    """
    table = tables + tl.program_id(0).to(tl.int64) * (buckets + slots + HEADS * WIDTH)
    cells = tl.arange(0, HEADS * WIDTH)
    for i in range(first + tl.program_id(0), last, tl.num_programs(0)):
        own, head = tl.load(starts + i), tl.load(head_starts + i)
        size = (tl.load(head_starts + 1 + i) - head).to(tl.int32)
        for b in range(0, buckets + slots, HEADS * WIDTH):
            tl.store(table + b + cells, 0, mask=b + cells < buckets + slots)
        # The warps of a program share the table: each step has to be over in all of them.
        tl.debug_barrier()
        _add_heads(ranks, weights, list_starts, list_rows, list_weights, after, table,
                   own, head, size, buckets, HEADS, WIDTH)  # fmt: skip
        tl.debug_barrier()
        count = _pick(starts, ranks, weights, head_starts, list_starts, list_rows, after, table, counter,
                      keys, i, own, head, size, buckets, slots, enough, room, steps,
                      HEADS, WIDTH, PROBES)  # fmt: skip
        tl.store(counts + i - first, count)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["pairs", "steps"])
def _verify(  # type: ignore[no-untyped-def]
    starts, columns, values, keys, distances, pairs, steps, PAIRS: tl.constexpr, ENTRIES: tl.constexpr
):
    """d of every candidate: the entries of row j are looked up in row i, whose columns ascend."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < pairs
    key = tl.load(keys + pair, mask=exists, other=0)
    i, j = key >> 32, key & 0xFFFFFFFF
    own, base = tl.load(starts + i)[:, None], tl.load(starts + j)[:, None]
    own_size = (tl.load(starts + 1 + i)[:, None] - own).to(tl.int32)
    size = (tl.load(starts + 1 + j)[:, None] - base).to(tl.int32)
    size = tl.where(exists[:, None], size, 0)
    entry = tl.arange(0, ENTRIES)[None, :]
    total = tl.zeros([PAIRS, ENTRIES], tl.float64)
    for c in range(0, tl.max(tl.max(size, 1), 0), ENTRIES):
        asked = c + entry < size
        wanted = tl.load(columns + base + c + entry, mask=asked, other=0)
        low = _find(columns, own, own_size + tl.zeros_like(wanted), wanted, steps, asked)
        shared = asked & (low < own_size)
        shared = shared & (tl.load(columns + own + low, mask=shared, other=-1) == wanted)
        ours = tl.load(values + own + low, mask=shared, other=0.0)
        total += tl.minimum(ours, tl.load(values + base + c + entry, mask=shared, other=0.0))
    m = tl.sum(total, 1)
    d = nearest((1.0 - m / (2.0 - m)) * 1e12) / 1e12
    tl.store(distances + pair, tl.where(d > 0.0, d, 0.0), mask=exists)


def bounds(max_distance: float, longest: int) -> tuple[int, int]:
    """T and m_min - T of the method, in units of 2^-14.

    Sums of w are whole numbers not below 2^14 m, so the lower bound is rounded up. Two things let m be less
    than D says, and are allowed for twice over: d is rounded by 5e-13 and a few 2^-53, which is less than
    2e-12 in m, since |dm/dd| <= 2; and a float64 sum of `longest` terms errs by longest 2^-53.
    """
    m_min = 2 * (1 - max_distance) / (2 - max_distance) - 4e-12 - longest * 2.0**-52
    least = max(math.ceil(m_min * WHOLE), 0)
    tail = int(_TAIL * least)
    return tail, max(least - tail, 1)  # w is at least 1: all pairs that share an entry, if m_min is 0


@dataclass(frozen=True)
class _Table:
    """Buckets and slots, powers of two, and `cells` (programs, buckets + slots + a tile) int32."""

    buckets: int
    slots: int
    cells: torch.Tensor


def _table(n: int, longest: int, device: torch.device) -> _Table:
    # A bucket is met by at most n / buckets + 1 rows and gets at most 2^14 + longest of each: less than 2^31.
    least = -(-n * (WHOLE + longest) // 2**30)
    buckets = pad_to_power_of_two(max(least, min(n, _BUCKETS)))
    slots = pad_to_power_of_two(min(n, _SLOTS))
    programs = 3  # the interpreter runs one after the other
    if device.type == "cuda":
        programs = _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    shape = (programs, buckets + slots + _HEADS * _WIDTH)
    return _Table(buckets, slots, torch.empty(shape, dtype=torch.int32, device=device))


def plan_jaccard(n: int, entries: int, free_bytes: int | None = None) -> Plan:
    """Memory of joining N rows with `entries` entries in all; 24 bytes a pair come on top.

    A pass has room for 64 candidates for each of its rows, and for N more: a single row may have as many.
    Where that does not do, it is split. As many entries are sorted at a time as a pass has rows on average.
    """
    tables = 4 * (_BUCKETS + _SLOTS + _HEADS * _WIDTH) * _PROGRAMS * 256  # multiprocessors, rounded up
    fixed = entries * ENTRY_BYTES + n * (ROW_BYTES + _PASS_BYTES) + tables
    a_row = max(_PASS_BYTES * _CANDIDATES, SORT_BYTES * -(-entries // n))
    return split("jaccard_pairs", n, fixed, a_row, free_bytes, most_rows=_MOST_ROWS)


def distances_of(v: SparseRows, keys: torch.Tensor, longest: int) -> torch.Tensor:
    """d of pairs of rows, on a GPU.

    Args:
        v: rows that sum to 1, columns ascending.
        keys: (P,) int64, i << 32 | j.
        longest: entries of the longest row.

    Returns:
        (P,) float64.
    """
    distances = torch.empty(len(keys), dtype=torch.float64, device=keys.device)
    if len(keys):
        with on(keys):
            # Not fused: multiplying and adding in one would round once where the definition rounds twice.
            _verify[(triton.cdiv(len(keys), _PAIRS),)](
                v.starts, v.indices, v.values, keys, distances, len(keys), longest.bit_length(),
                PAIRS=_PAIRS, ENTRIES=_ENTRIES, num_warps=_VERIFY_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return distances


def collect_candidates(
    head_starts: torch.Tensor, columns: torch.Tensor, weights: torch.Tensor,
    list_starts: torch.Tensor, list_rows: torch.Tensor, list_weights: torch.Tensor, after: torch.Tensor,
    others: int, enough: int,
) -> torch.Tensor:  # fmt: skip
    """Keys r << 32 | j of rows that share `enough` in their heads, on a GPU; some may be there twice.

    Args:
        head_starts: (R + 1,) int64, of heads that hold `columns` int32, lists, and `weights` int16.
        list_starts: (C + 1,) int64, of lists that hold `list_rows` int32 and `list_weights` int16.
        after: (head entries,) int64, where in its list the first row stands that counts.
        others: all rows in lists are below it.
    """
    rows, device = len(head_starts) - 1, columns.device
    longest = int(head_starts.diff().max()) if rows else 0
    # The others' heads are not here: they come first and are empty, and nobody seems to have met before.
    begin = others + 1
    starts = torch.cat([torch.zeros(begin, dtype=torch.int64, device=device), head_starts])
    table = _table(others, longest, device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    room = rows * _CANDIDATES
    while rows:
        keys = torch.empty(room, dtype=torch.int64, device=device)
        counter = torch.zeros(1, dtype=torch.int64, device=device)
        with on(keys):
            _candidates[(min(len(table.cells), rows),)](
                starts, columns, weights, starts, list_starts, list_rows, list_weights, after,
                table.cells, counter, counts, keys, begin, begin + rows, table.buckets, table.slots, enough,
                len(keys), longest.bit_length(),
                HEADS=_HEADS, WIDTH=_WIDTH, PROBES=_PROBES, num_warps=_JOIN_WARPS, maxnreg=_REGISTERS,
            )  # fmt: skip
        if int(counter) <= room:
            return keys[: int(counter)] - (begin << 32)
        room = int(counter)
    return torch.empty(0, dtype=torch.int64, device=device)


def _join(
    v: SparseRows, heads: Heads, max_distance: float, enough: int,
    keys: torch.Tensor, table: _Table, begin: int, end: int,
) -> Iterator[SparseRows]:  # fmt: skip
    """Pairs of rows [begin, end), in as many parts as the room for candidates, `keys`, asks for."""
    counts = torch.empty(end - begin, dtype=torch.int32, device=keys.device)
    counter = torch.zeros(1, dtype=torch.int64, device=keys.device)
    steps = heads.longest.bit_length()
    with on(keys):
        _candidates[(min(len(table.cells), end - begin),)](
            heads.starts, heads.ranks, heads.weights, heads.head_starts, heads.list_starts, heads.list_rows,
            heads.list_weights, heads.after, table.cells, counter, counts, keys,
            begin, end, table.buckets, table.slots, enough, len(keys), steps,
            HEADS=_HEADS, WIDTH=_WIDTH, PROBES=_PROBES, num_warps=_JOIN_WARPS, maxnreg=_REGISTERS,
        )  # fmt: skip
    found = int(counter)
    if found > len(keys):  # the counts are right all the same, and say what fits
        for first, last in groups(starts_of(counts), len(keys)):
            yield from _join(v, heads, max_distance, enough, keys, table, begin + first, begin + last)
        return
    distances = distances_of(v, keys[:found], heads.longest)
    near = distances <= max_distance
    close, order = keys[:found][near].sort()
    sizes = torch.bincount((close >> 32) - begin, minlength=end - begin)
    indices = (close & 0xFFFFFFFF).to(torch.int32)
    yield SparseRows(starts_of(sizes), indices, distances[near][order])


def jaccard_pairs(v: SparseRows, max_distance: float) -> SparseRows:
    """All pairs i < j with d(i, j) <= max_distance that share at least one entry.

    Args:
        v: rows of `k_reciprocal`, each summing to 1; on a GPU columns ascend.
        max_distance: in [0, 1]. Pairs that share nothing are at distance 1 and never returned.

    Returns:
        CSR rows of distances holding j > i alone, ascending. A distance 0 is an entry like any other.

    Raises:
        NotEnoughMemory: not even one pass fits on the device.
    """
    if not takes_triton(v.values):
        return SparseRows.of(cpu.jaccard_pairs(v.on_cpu(), max_distance))
    n, device = len(v), v.values.device
    plan = plan_jaccard(n, len(v.indices), free_bytes(device))
    tail, enough = bounds(max_distance, int(v.starts.diff().max()))
    most = min(plan.rows_per_pass * -(-len(v.indices) // n), _MOST_ENTRIES)
    heads = find_heads(v, tail, max(most, 1))
    keys = torch.empty(n + plan.rows_per_pass * _CANDIDATES, dtype=torch.int64, device=device)
    table = _table(n, heads.longest, device)
    parts: list[SparseRows] = []
    with counting(n, "Jaccard distances", "rows") as count:
        for begin in range(0, n, plan.rows_per_pass):
            end = min(begin + plan.rows_per_pass, n)
            parts.extend(_join(v, heads, max_distance, enough, keys, table, begin, end))
            pairs = sum(len(part.indices) for part in parts)
            require("jaccard_pairs, to join its parts", _PAIR_BYTES * pairs, free_bytes(device))
            count(end - begin)
    return join_rows(parts)
