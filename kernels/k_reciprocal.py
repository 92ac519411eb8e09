"""k-reciprocal encoding: neighbours -> sparse rows V whose overlap is a better similarity.

Legend: knn(i), the k1 nearest rows of i, itself first; h = round_half_even(k1 / 2) + 1; half lists hold h.

    R(i)    = {j in knn(i) : i in knn(j)}
    H(j)    = the same with the first h columns
    R*(i)   = R(i) united with every H(j), j in R(i), for which |H(j) & R(i)| > 2/3 |H(j)|
    V(i, e) = exp(-(2 - 2 s(i, e))) / sum over R*(i) of the same,   e in R*(i);   0 elsewhere
    V(i)   <- mean of V(j) over the first k2 columns j of knn(i)          (query expansion; k2 = 1: none)

2 - 2 s is the squared Euclidean distance of unit rows, s of `similarity.py`. The comparison with 2/3 is made
in integers, and says how much a list can add: fewer than a third of its members are not in R(i).

Shapes: features (N, D), neighbours (N, K), K = min(k1, N); V is a CSR matrix (N, N) float64, columns
ascending; a row sums to 1 and holds at most K (1 + (h - 1) // 3) entries before expansion (180 at k1 = 30; 27
to 31 seen), at most k2 times as many after (39 to 134 seen at k2 = 6).
Method: reciprocity as two bitmasks a row; candidates compacted, then compared with one another; known
similarities looked up, the few others computed; rows ordered by counting smaller columns; expansion by binary
search of every column in the k2 rows that are averaged. No atomics: results do not depend on the schedule.
Error: a few units of 2^-53 relative to the formula, from the order of sums; 2^-43 where that takes a computed
s to the next step of its grid.
Memory: V before and after expansion, 16 bytes a row of masks, and scratch of at most 2^18 rows at a time.
Time: O(N K^2 h) compares and O(N k2^2 K log K) look-ups, all in rows just gathered; 8 D bytes of float32
features for every member that is not a neighbour.
Source: Zhong et al., "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, eq. 3 to 7;
columns and the half list as every published pseudo-label generator takes them (self counts).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dmx.kernels.cpu import k_reciprocal as cpu
from dmx.kernels.cpu.k_reciprocal import half_columns as half_columns
from dmx.kernels.cpu.knn import Neighbours as CpuNeighbours
from dmx.kernels.device import as_array, on, pad_to_power_of_two, takes_triton
from dmx.kernels.knn import Neighbours
from dmx.kernels.memory import Plan, free_bytes, split
from dmx.kernels.similarity import from_grid, on_grid, similarity_reference, squared_lengths
from dmx.kernels.sparse import SparseRows, join_rows, starts_of

MOST_COLUMNS = 64  # bits of a mask
_ENTRY_BYTES = 12  # of a sparse row: int32 column, float64 value
_MOST_ROWS = 2**18  # a pass: 60 waves of one-warp programs on an H100; more would only hold more scratch
_LEAST_ROWS = 16  # passes are multiples of it, so that what they begin with is aligned and nothing recompiles

# One program a row, waiting for gathers: what hides them is rows in flight, so tiles get warps enough for 8
# values a thread. That takes 24 to 48 registers, and an SM holds 40 to 64 warps.
_TILE_PER_WARP = 256
# Four loads of 128 bits in flight a thread at float32, 64 KiB an SM: more than its share of the memory's
# latency times bandwidth.
_FEATURE_BLOCK = 256
# Rows hold about 30 entries before expansion, candidates for it fewer.
_ROW_BLOCK = 32
# The usual k2 = 6 rows are one group, their 180 or so entries three blocks. 4 values a thread, because a
# look-up holds 64-bit addresses. Left alone, the compiler spills 8 bytes to get by with 8 registers fewer.
_LIST_GROUP, _ENTRY_BLOCK, _AVERAGE_WARPS, _AVERAGE_REGISTERS = 8, 64, 4, 80


def k_reciprocal_reference(
    features: torch.Tensor, neighbour_indices: torch.Tensor, k1: int, k2: int
) -> torch.Tensor:
    """The formula, dense: (N, D) features and (N, K) neighbours -> (N, N) float64."""
    n = len(features)
    columns = neighbour_indices.long()

    def mutual(lists: torch.Tensor) -> torch.Tensor:
        listed = torch.zeros(n, n, dtype=torch.bool, device=lists.device).scatter_(1, lists, True)
        return (listed & listed.T).double()

    full, half = mutual(columns), mutual(columns[:, : half_columns(k1)])
    accepted = full * (3 * (full @ half.T) > 2 * half.sum(1))
    members = full + accepted @ half > 0
    weights = members * torch.exp(-(2 - 2 * similarity_reference(features, features)))
    v = weights / weights.sum(1, keepdim=True)
    return v[columns[:, :k2]].mean(1)


@triton.jit
def _mutual(neighbours, full, half, K: tl.constexpr, H: tl.constexpr, KP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bit c of full[i]: i in knn(j), j = knn(i)[c]; bit c of half[i]: the same with the half lists."""
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, KP)
    j = tl.load(neighbours + i * K + c, mask=c < K, other=0).to(tl.int64)
    d = c[None, :]
    there = (c < K)[:, None] & (d < K)
    back = (tl.load(neighbours + j[:, None] * K + d, mask=there, other=-1) == i).to(tl.int32)
    bit = tl.full([KP], 1, tl.int64) << c
    in_full = tl.max(back, 1) > 0
    in_half = (tl.max(tl.where(d < H, back, 0), 1) > 0) & (c < H)
    tl.store(full + i, tl.sum(tl.where(in_full, bit, 0), 0))
    tl.store(half + i, tl.sum(tl.where(in_half, bit, 0), 0))


@triton.jit
def _additions(  # type: ignore[no-untyped-def]
    neighbours, full, half, begin, added, counts,
    K: tl.constexpr, H: tl.constexpr, KP: tl.constexpr, HP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What the accepted H(j) hold beside R(i), repeats included: added (rows, WIDTH), counts (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    i = begin + row
    c, d = tl.arange(0, KP), tl.arange(0, HP)[None, :]
    bits = tl.load(full + i)
    chosen = (c < K) & (((bits >> c) & 1) == 1)
    j = tl.load(neighbours + i * K + c, mask=chosen, other=0).to(tl.int64)
    half_bits = tl.load(half + j, mask=chosen, other=0)
    in_half = (d < H) & (((half_bits[:, None] >> d) & 1) == 1)
    e = tl.load(neighbours + j[:, None] * K + d, mask=in_half, other=-1)
    common = tl.zeros([KP, HP], tl.int32)  # 1 where e is in R(i), whose members are distinct
    for m in range(K):
        member = tl.load(neighbours + i * K + m)
        common += ((e == member) & (((bits >> m) & 1) == 1)).to(tl.int32)
    accepted = 3 * tl.sum(common, 1) > 2 * tl.sum(in_half.to(tl.int32), 1)
    new = (in_half & accepted[:, None] & (common == 0)).to(tl.int32)
    in_list = tl.sum(new, 1)
    before = tl.cumsum(in_list, 0) - in_list
    slot = before[:, None] + tl.cumsum(new, 1) - new
    tl.store(added + row * WIDTH + slot, e, mask=new == 1)
    tl.store(counts + row, tl.sum(in_list, 0))


@triton.jit
def _members(  # type: ignore[no-untyped-def]
    neighbours, similarities, full, begin, added, counts, members, weights, sizes,
    K: tl.constexpr, KP: tl.constexpr, ADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R*(i) once each, R(i) first, with exp(-(2 - 2 s)) or, where s is not known, 0: (rows, WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    i = begin + row
    c = tl.arange(0, KP)
    near = tl.load(neighbours + i * K + c, mask=c < K, other=-1)
    known = tl.load(similarities + i * K + c, mask=c < K, other=0.0)
    chosen = (((tl.load(full + i) >> c) & 1) == 1) & (c < K)
    slot = row * WIDTH + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(members + slot, near, mask=chosen)
    tl.store(weights + slot, tl.exp(-(2.0 - 2.0 * known)), mask=chosen)
    size = tl.sum(chosen.to(tl.int32), 0)
    added += row * ADDED
    count = tl.load(counts + row)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        e = tl.load(added + at, mask=at < count, other=-2)
        repeats = tl.zeros([BLOCK], tl.int32)
        for second in range(0, first + BLOCK, BLOCK):
            before = second + tl.arange(0, BLOCK)
            other = tl.load(added + before, mask=before < count, other=-2)
            same = (other[:, None] == e[None, :]) & (before[:, None] < at[None, :])
            repeats += tl.sum(same.to(tl.int32), 0)
        place = tl.sum(tl.where(near[:, None] == e[None, :], c[:, None] + 1, 0), 0) - 1
        s = tl.load(similarities + i * K + place, mask=place >= 0, other=0.0)
        weight = tl.where(place >= 0, tl.exp(-(2.0 - 2.0 * s)), 0.0)
        new = ((repeats == 0) & (at < count)).to(tl.int32)
        next_slot = row * WIDTH + size + tl.cumsum(new, 0) - new
        tl.store(members + next_slot, e, mask=new == 1)
        tl.store(weights + next_slot, weight, mask=new == 1)
        size += tl.sum(new, 0)
    tl.store(sizes + row, size)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    features, squares, full, begin, members, weights, sizes, D,
    KP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces the zeros among the weights: similarities of members that are no neighbours."""
    row = tl.program_id(0).to(tl.int64)
    i = begin + row
    reciprocal = ((tl.load(full + i) >> tl.arange(0, KP)) & 1).to(tl.int32)
    for t in range(tl.sum(reciprocal, 0), tl.load(sizes + row)):
        if tl.load(weights + row * WIDTH + t) == 0.0:
            j = tl.load(members + row * WIDTH + t).to(tl.int64)
            products = tl.zeros([BLOCK], tl.float64)
            for first in range(0, D, BLOCK):
                at = first + tl.arange(0, BLOCK)
                x = tl.load(features + i * D + at, mask=at < D, other=0.0).to(tl.float64)
                y = tl.load(features + j * D + at, mask=at < D, other=0.0).to(tl.float64)
                products += x * y
            steps = on_grid(tl.sum(products, 0), tl.load(squares + i), tl.load(squares + j))
            tl.store(weights + row * WIDTH + t, tl.exp(-(2.0 - 2.0 * from_grid(steps))))


@triton.jit
def _order(columns, values, starts, sizes, to_columns, to_values, to_starts, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copies rows of distinct columns so that the columns ascend and the values of a row sum to 1."""
    row = tl.program_id(0).to(tl.int64)
    start, size, to = tl.load(starts + row), tl.load(sizes + row), tl.load(to_starts + row)
    totals = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        totals += tl.load(values + start + at, mask=at < size, other=0.0)
    total = tl.sum(totals, 0)
    for first in range(0, size, BLOCK):
        at = first + tl.arange(0, BLOCK)
        column = tl.load(columns + start + at, mask=at < size, other=-1)
        rank = tl.zeros([BLOCK], tl.int32)
        for second in range(0, size, BLOCK):
            other_at = second + tl.arange(0, BLOCK)
            other = tl.load(columns + start + other_at, mask=other_at < size, other=2147483647)
            rank += tl.sum((other[:, None] < column[None, :]).to(tl.int32), 0)
        value = tl.load(values + start + at, mask=at < size, other=0.0)
        tl.store(to_columns + to + rank, column, mask=at < size)
        tl.store(to_values + to + rank, value / total, mask=at < size)


@triton.jit
def _rows(neighbours, starts, first, LISTS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of V of neighbours first + [0, GROUP): number, start, size (0 beyond LISTS), each (GROUP, 1)."""
    c = first + tl.arange(0, GROUP)[:, None]
    j = tl.load(neighbours + c, mask=c < LISTS, other=0).to(tl.int64)
    start = tl.load(starts + j)
    return c, start, tl.where(c < LISTS, (tl.load(starts + j + 1) - start).to(tl.int32), 0)


@triton.jit
def _average(  # type: ignore[no-untyped-def]
    neighbours, starts, columns, values, begin, to_starts, to_columns, to_values, counts,
    K: tl.constexpr, LISTS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """The union of the rows knn(i)[:LISTS]: its size or, if FILL, its columns with the sums of their values.

    Every column is looked up in the other rows, GROUP of them at once, and written where it occurs first. How
    much room is needed shows when all rows are counted, so this runs twice.
    """
    row = tl.program_id(0).to(tl.int64)
    neighbours += (begin + row) * K
    entries, used = 0, 0
    for group in range(0, LISTS, GROUP):
        _, _, sizes = _rows(neighbours, starts, group, LISTS, GROUP)
        entries += tl.sum(tl.sum(sizes, 1), 0)
    for first in range(0, entries, BLOCK):  # of the rows as if written one after the other
        at = first + tl.arange(0, BLOCK)
        live = at < entries
        own, before = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
        passed = 0
        for group in range(0, LISTS, GROUP):
            _, _, sizes = _rows(neighbours, starts, group, LISTS, GROUP)
            past = passed + tl.cumsum(sizes, 0) <= at[None, :]
            own += tl.sum(past.to(tl.int32), 0)
            before += tl.sum(tl.where(past, sizes, 0), 0)
            passed += tl.sum(tl.sum(sizes, 1), 0)
        own_start = tl.load(starts + tl.load(neighbours + own, mask=live, other=0).to(tl.int64))
        wanted = tl.load(columns + own_start + (at - before), mask=live, other=-1)
        earlier = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float64)
        for group in range(0, LISTS, GROUP):
            other, start, left = _rows(neighbours, starts, group, LISTS, GROUP)
            mask = live[None, :] & (other < (LISTS if FILL else own[None, :]))
            offset = tl.zeros([GROUP, BLOCK], tl.int32)
            longest = tl.max(tl.max(left, 1), 0)
            while longest > 1:  # the last column <= wanted lies in [offset, offset + left), if there is one
                middle = offset + left // 2
                column = tl.load(columns + start + middle, mask=mask, other=0)
                offset = tl.where(column <= wanted[None, :], middle, offset)
                left -= left // 2
                longest -= longest // 2
            found = mask & (tl.load(columns + start + offset, mask=mask, other=-1) == wanted[None, :])
            earlier += tl.sum((found & (other < own[None, :])).to(tl.int32), 0)
            if FILL:
                total += tl.sum(tl.load(values + start + offset, mask=found, other=0.0), 0)
        new = ((earlier == 0) & live).to(tl.int32)
        if FILL:
            slot = tl.load(to_starts + row) + used + tl.cumsum(new, 0) - new
            tl.store(to_columns + slot, wanted, mask=new == 1)
            tl.store(to_values + slot, total, mask=new == 1)
        used += tl.sum(new, 0)
    if not FILL:
        tl.store(counts + row, used)


def _widths(columns: int, k1: int) -> tuple[int, int, int]:
    """Columns of the half lists; what they can add to R(i), repeats included; most members of R*(i)."""
    half = min(half_columns(k1), columns)
    added = columns * ((half - 1) // 3)  # 3 |H(j) & R(i)| > 2 |H(j)| leaves fewer than a third of H(j)
    return half, added, columns + added


def plan_k_reciprocal(n: int, k1: int, k2: int, free_bytes: int | None = None) -> Plan:
    """What `k_reciprocal` takes beside its arguments.

    How many entries V has shows only while it is built. This counts with about the most that was seen, 5/4 K
    a row before expansion and K (1 + 7/10 (k2 - 1)) after it; the call plans once more with the exact number
    before it takes memory for the expanded rows.

    Args:
        n: rows.
        k1, k2: as for `k_reciprocal`.
        free_bytes: what the device has left; None for as much as is wanted.

    Raises:
        NotEnoughMemory: not even 16 rows at a time fit.
    """
    columns = min(k1, n)
    near = min(k2, columns)
    _, added, width = _widths(columns, k1)
    encoded = columns + columns // 4
    expanded = columns + 7 * columns * (near - 1) // 10
    # Without expansion the parts of several passes and what they are joined to are held together.
    rows = (8 + _ENTRY_BYTES * encoded) + (8 + _ENTRY_BYTES * (expanded if near > 1 else encoded))
    # 24 bytes: counts, sizes, where a row begins in scratch and in its part.
    scratch = 24 + 4 * added + _ENTRY_BYTES * width
    return split("k_reciprocal", n, n * (20 + rows), scratch, free_bytes, _LEAST_ROWS, _MOST_ROWS)


def _warps(tile: int) -> int:
    return max(1, tile // _TILE_PER_WARP)


def _encode(
    features: torch.Tensor, squares: torch.Tensor, near: Neighbours, k1: int, plan: Plan
) -> SparseRows:
    """V before expansion, in the passes of the plan."""
    n, columns = near.indices.shape
    half, most_added, width = _widths(columns, k1)
    padded, padded_half = pad_to_power_of_two(columns, 16), pad_to_power_of_two(half, 16)
    device = near.indices.device
    full_bits = torch.empty(n, dtype=torch.int64, device=device)
    half_bits = torch.empty_like(full_bits)
    _mutual[(n,)](near.indices, full_bits, half_bits, K=columns, H=half, KP=padded,
                  num_warps=_warps(padded * padded))  # fmt: skip
    rows = plan.rows_per_pass
    added = torch.empty(rows * most_added, dtype=torch.int32, device=device)
    members = torch.empty(rows * width, dtype=torch.int32, device=device)
    weights = torch.empty(rows * width, dtype=torch.float64, device=device)
    counts, sizes = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    slots = width * torch.arange(rows, device=device)
    block = min(pad_to_power_of_two(features.shape[1], 32), _FEATURE_BLOCK)
    parts = []
    for begin in range(0, n, rows):
        grid = (min(rows, n - begin),)
        _additions[grid](near.indices, full_bits, half_bits, begin, added, counts,
                         K=columns, H=half, KP=padded, HP=padded_half, WIDTH=most_added,
                         num_warps=_warps(padded * padded_half))  # fmt: skip
        _members[grid](near.indices, near.similarities, full_bits, begin, added, counts,
                       members, weights, sizes, K=columns, KP=padded, ADDED=most_added, WIDTH=width,
                       BLOCK=_ROW_BLOCK, num_warps=_warps(padded * _ROW_BLOCK))  # fmt: skip
        _weigh[grid](features, squares, full_bits, begin, members, weights, sizes, features.shape[1],
                     KP=padded, WIDTH=width, BLOCK=block, num_warps=1)  # fmt: skip
        part = _empty(sizes[: grid[0]])
        _order[grid](members, weights, slots, sizes, part.indices, part.values, part.starts,
                     BLOCK=_ROW_BLOCK, num_warps=1)  # fmt: skip
        parts.append(part)
    return parts[0] if len(parts) == 1 else join_rows(parts)


def _empty(sizes: torch.Tensor) -> SparseRows:
    """Room for rows of these sizes."""
    starts = starts_of(sizes)
    entries = int(starts[-1])
    return SparseRows(
        starts,
        torch.empty(entries, dtype=torch.int32, device=sizes.device),
        torch.empty(entries, dtype=torch.float64, device=sizes.device),
    )


def _expand(v: SparseRows, indices: torch.Tensor, lists: int) -> SparseRows:
    """Means of the rows of the first `lists` neighbours."""
    n, columns = indices.shape
    sizes = torch.empty(n, dtype=torch.int32, device=indices.device)
    settings = {"K": columns, "LISTS": lists, "GROUP": _LIST_GROUP, "BLOCK": _ENTRY_BLOCK,
                "num_warps": _AVERAGE_WARPS, "maxnreg": _AVERAGE_REGISTERS}  # fmt: skip
    _average[(n,)](indices, v.starts, v.indices, v.values, 0, None, None, None, sizes, FILL=False, **settings)
    entries, longest = int(sizes.sum()), int(sizes.max())
    plan = split("k_reciprocal", n, 8 * n + _ENTRY_BYTES * entries, 8 + _ENTRY_BYTES * longest,
                 free_bytes(indices.device), _LEAST_ROWS, _MOST_ROWS)  # fmt: skip
    out = _empty(sizes)
    for begin in range(0, n, plan.rows_per_pass):
        end = min(begin + plan.rows_per_pass, n)
        part = _empty(sizes[begin:end])
        grid = (end - begin,)
        _average[grid](indices, v.starts, v.indices, v.values, begin, part.starts, part.indices, part.values,
                       None, FILL=True, **settings)  # fmt: skip
        _order[grid](part.indices, part.values, part.starts, sizes[begin:end], out.indices, out.values,
                     out.starts[begin:], BLOCK=_ROW_BLOCK, num_warps=1)  # fmt: skip
    return out


def k_reciprocal(
    features: torch.Tensor, neighbours: Neighbours, k1: int, k2: int, *, squares: torch.Tensor | None = None
) -> SparseRows:
    """V of every row, on the features' device.

    Args:
        features: (N, D) of any floating type.
        neighbours: of `self_knn(features, k1)`.
        k1: length of the neighbour lists asked for; decides the length of the half lists.
        k2: neighbours averaged by query expansion, itself included; 1 for none.
        squares: (N,) float64 squared lengths where the caller has them already.

    Returns:
        V as CSR rows (N, N), columns ascending (in any order on the CPU).

    Raises:
        ValueError: k1 is above 64, on a GPU.
        NotEnoughMemory: not even 16 rows at a time fit on the device.
    """
    squares = squared_lengths(features) if squares is None else squares
    if not takes_triton(features):
        near = CpuNeighbours(neighbours.indices.numpy(), neighbours.similarities.numpy())
        return SparseRows.of(cpu.k_reciprocal(as_array(features), squares.numpy(), near, k1, k2))
    if k1 > MOST_COLUMNS:
        advice = 'shorten the lists, or use device="cpu"'
        raise ValueError(f"k_reciprocal: wanted k1 <= {MOST_COLUMNS}, found {k1}; {advice}")
    n, columns = neighbours.indices.shape
    plan = plan_k_reciprocal(n, k1, k2, free_bytes(features.device))
    with on(features):
        v = _encode(features.contiguous(), squares, neighbours, k1, plan)
        lists = min(k2, columns)
        return v if lists == 1 else _expand(v, neighbours.indices, lists)
