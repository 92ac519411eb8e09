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

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dmx.kernels.cpu import k_reciprocal as cpu
from dmx.kernels.cpu.k_reciprocal import half_columns as half_columns
from dmx.kernels.cpu.knn import Neighbours as CpuNeighbours
from dmx.kernels.cpu.sparse import SparseRows as CpuSparseRows
from dmx.kernels.device import as_array, on, pad_to_power_of_two, takes_triton
from dmx.kernels.expansion import ENTRY_BYTES, LEAST_ROWS, MOST_ROWS, expand, expand_reference
from dmx.kernels.knn import Neighbours
from dmx.kernels.memory import Plan, free_bytes, split
from dmx.kernels.progress import counting
from dmx.kernels.similarity import from_grid, on_grid, similarity_reference, squared_lengths
from dmx.kernels.sparse import SparseRows, empty_rows, join_rows, places_of, put_in_order, together

MOST_COLUMNS = 64  # bits of a mask

# One program a row, waiting for gathers: what hides them is rows in flight, so tiles get warps enough for 8
# values a thread. That takes 24 to 48 registers, and an SM holds 40 to 64 warps.
_TILE_PER_WARP = 256
# Four loads of 128 bits in flight a thread at float32, 64 KiB an SM: more than its share of the memory's
# latency times bandwidth.
_FEATURE_BLOCK = 256
# Rows hold about 30 entries before expansion, candidates for it fewer.
_ROW_BLOCK = 32


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
    return expand_reference(v, columns[:, :k2])


@triton.jit
def _mutual(  # type: ignore[no-untyped-def]
    own, places, lists, full, half, K: tl.constexpr, H: tl.constexpr, KP: tl.constexpr
):
    """Bit c of full[row]: i in knn(j), j = knn(i)[c]; bit c of half[row]: the same with the half lists."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.load(own + row * K)  # itself first
    c = tl.arange(0, KP)
    at = tl.load(places + row * K + c, mask=c < K, other=0).to(tl.int64)
    d = c[None, :]
    there = (c < K)[:, None] & (d < K)
    back = (tl.load(lists + at[:, None] * K + d, mask=there, other=-1) == i).to(tl.int32)
    bit = tl.full([KP], 1, tl.int64) << c
    in_full = tl.max(back, 1) > 0
    in_half = (tl.max(tl.where(d < H, back, 0), 1) > 0) & (c < H)
    tl.store(full + row, tl.sum(tl.where(in_full, bit, 0), 0))
    tl.store(half + row, tl.sum(tl.where(in_half, bit, 0), 0))


@triton.jit
def _additions(  # type: ignore[no-untyped-def]
    own, places, lists, full, half, added, counts,
    K: tl.constexpr, H: tl.constexpr, KP: tl.constexpr, HP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What the accepted H(j) hold beside R(i), repeats included: added (rows, WIDTH), counts (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, KP), tl.arange(0, HP)[None, :]
    bits = tl.load(full + row)
    chosen = (c < K) & (((bits >> c) & 1) == 1)
    at = tl.load(places + row * K + c, mask=chosen, other=0).to(tl.int64)
    half_bits = tl.load(half + at, mask=chosen, other=0)
    in_half = (d < H) & (((half_bits[:, None] >> d) & 1) == 1)
    e = tl.load(lists + at[:, None] * K + d, mask=in_half, other=-1)
    common = tl.zeros([KP, HP], tl.int32)  # 1 where e is in R(i), whose members are distinct
    for m in range(K):
        member = tl.load(own + row * K + m)
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
    own, similarities, full, added, counts, members, weights, sizes,
    K: tl.constexpr, KP: tl.constexpr, ADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R*(i) once each, R(i) first, with exp(-(2 - 2 s)) or, where s is not known, 0: (rows, WIDTH)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, KP)
    near = tl.load(own + row * K + c, mask=c < K, other=-1)
    known = tl.load(similarities + row * K + c, mask=c < K, other=0.0)
    chosen = (((tl.load(full + row) >> c) & 1) == 1) & (c < K)
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
        s = tl.load(similarities + row * K + place, mask=place >= 0, other=0.0)
        weight = tl.where(place >= 0, tl.exp(-(2.0 - 2.0 * s)), 0.0)
        new = ((repeats == 0) & (at < count)).to(tl.int32)
        next_slot = row * WIDTH + size + tl.cumsum(new, 0) - new
        tl.store(members + next_slot, e, mask=new == 1)
        tl.store(weights + next_slot, weight, mask=new == 1)
        size += tl.sum(new, 0)
    tl.store(sizes + row, size)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    features, squares, numbers, others, other_squares, members, weights, starts, sizes, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces the zeros among the weights: similarities of members that are no neighbours."""
    row = tl.program_id(0).to(tl.int64)
    i, start = tl.load(numbers + row), tl.load(starts + row)
    for t in range(start, start + tl.load(sizes + row)):
        if tl.load(weights + t) == 0.0:
            j = tl.load(members + t).to(tl.int64)
            products = tl.zeros([BLOCK], tl.float64)
            for first in range(0, D, BLOCK):
                at = first + tl.arange(0, BLOCK)
                x = tl.load(features + i * D + at, mask=at < D, other=0.0).to(tl.float64)
                y = tl.load(others + j * D + at, mask=at < D, other=0.0).to(tl.float64)
                products += x * y
            steps = on_grid(tl.sum(products, 0), tl.load(squares + i), tl.load(other_squares + j))
            tl.store(weights + t, tl.exp(-(2.0 - 2.0 * from_grid(steps))))


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
    rows = (8 + ENTRY_BYTES * encoded) + (8 + ENTRY_BYTES * (expanded if near > 1 else encoded))
    # 24 bytes: counts, sizes, where a row begins in scratch and in its part.
    scratch = 24 + 4 * added + ENTRY_BYTES * width
    return split("k_reciprocal", n, n * (20 + rows), scratch, free_bytes, LEAST_ROWS, MOST_ROWS)


def _require_mask(k1: int) -> None:
    if k1 > MOST_COLUMNS:
        advice = 'shorten the lists, or use device="cpu"'
        raise ValueError(f"k_reciprocal: wanted k1 <= {MOST_COLUMNS}, found {k1}; {advice}")


def _warps(tile: int) -> int:
    return max(1, tile // _TILE_PER_WARP)


@dataclass(frozen=True)
class Nearby:
    """R rows and the lists of their neighbours; where all rows are at hand, three times the same lists.

    Attributes:
        own: (R, K) int32, the lists of the rows, each itself first; numbers among all N rows.
        places: (R, K) int32, where in `lists` that of each neighbour stands.
        lists: (U, K) int32, numbers as in `own`.
    """

    own: torch.Tensor
    places: torch.Tensor
    lists: torch.Tensor

    def part(self, begin: int, end: int) -> Nearby:
        """Rows [begin, end)."""
        return Nearby(self.own[begin:end], self.places[begin:end], self.lists)

    def on_cpu(self) -> cpu.Nearby:
        """As NumPy arrays, without a copy."""
        return cpu.Nearby(self.own.numpy(), self.places.numpy(), self.lists.numpy())


@dataclass(frozen=True)
class Mutual:
    """Who is in the list of his neighbours, of R rows.

    Attributes:
        full, half: by the full and by the half lists, a row each: (R,) int64 masks where they take Triton,
            (R, K) and (R, h) bool on the CPU.
    """

    full: torch.Tensor
    half: torch.Tensor


@dataclass(frozen=True)
class Members:
    """R*(i) of R rows, R(i) first: row r is ids[starts[r] : starts[r] + sizes[r]].

    Attributes:
        starts: (R + 1 or R,) int64; sizes: (R,) int32 or int64; ids: int32.
        weights: float64, exp(-(2 - 2 s)), or 0 where no list has s.
    """

    starts: torch.Tensor
    sizes: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def places(self) -> torch.Tensor:
        """(entries,) int64, where the entries of all rows stand in `ids`."""
        return places_of(self.starts[: len(self.sizes)], self.sizes)


def mutual(near: Nearby, k1: int) -> Mutual:
    """Reciprocity of R rows.

    Args:
        near: contiguous.
        k1: length of the neighbour lists asked for.

    Raises:
        ValueError: k1 is above 64, on a GPU.
    """
    rows, columns = near.own.shape
    half, _, _ = _widths(columns, k1)
    if not takes_triton(near.own):
        found = cpu.mutual(near.on_cpu(), half)
        return Mutual(torch.from_numpy(found[0]), torch.from_numpy(found[1]))
    _require_mask(k1)
    padded = pad_to_power_of_two(columns, 16)
    out = Mutual(*(torch.empty(rows, dtype=torch.int64, device=near.own.device) for _ in range(2)))
    with on(near.own):
        _mutual[(rows,)](near.own, near.places, near.lists, out.full, out.half, K=columns, H=half, KP=padded,
                         num_warps=_warps(padded * padded))  # fmt: skip
    return out


def members(
    near: Nearby, similarities: torch.Tensor, full: torch.Tensor, half: torch.Tensor, k1: int, n: int
) -> Members:
    """R*(i) of R rows.

    Args:
        near: as for `mutual`; similarities: (R, K) float64, contiguous.
        full: of the R rows; half: of the U whose lists are here; as in `Mutual`.
        k1: as for `mutual`.
        n: all numbers in the lists are below it.
    """
    rows, columns = near.own.shape
    if not takes_triton(near.own):
        csr = SparseRows.of(cpu.members(near.on_cpu(), similarities.numpy(), full.numpy(), half.numpy(), n))
        return Members(csr.starts, csr.starts.diff(), csr.indices, csr.values)
    half_width, most_added, width = _widths(columns, k1)
    padded, padded_half = pad_to_power_of_two(columns, 16), pad_to_power_of_two(half_width, 16)
    device = near.own.device
    added = torch.empty(rows * most_added, dtype=torch.int32, device=device)
    ids = torch.empty(rows * width, dtype=torch.int32, device=device)
    weights = torch.empty(rows * width, dtype=torch.float64, device=device)
    counts, sizes = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
    with on(near.own):
        _additions[(rows,)](near.own, near.places, near.lists, full, half, added, counts,
                            K=columns, H=half_width, KP=padded, HP=padded_half, WIDTH=most_added,
                            num_warps=_warps(padded * padded_half))  # fmt: skip
        _members[(rows,)](near.own, similarities, full, added, counts, ids, weights, sizes,
                          K=columns, KP=padded, ADDED=most_added, WIDTH=width,
                          BLOCK=_ROW_BLOCK, num_warps=_warps(padded * _ROW_BLOCK))  # fmt: skip
    return Members(width * torch.arange(rows, device=device), sizes, ids, weights)


def weigh(
    rows: Members, features: torch.Tensor, squares: torch.Tensor, numbers: torch.Tensor,
    others: torch.Tensor, other_squares: torch.Tensor,
) -> None:  # fmt: skip
    """Fills in, in place, the weights that no list has.

    Args:
        rows: where a weight is open the id is a row of `others`.
        features: contiguous; squares: their squared lengths, float64.
        numbers: (R,) int64; row i of `rows` is features[numbers[i]].
        others, other_squares: the same of members; where all rows are at hand, the same once more.
    """
    if not takes_triton(features):
        csr = CpuSparseRows(rows.starts.numpy(), rows.ids.numpy(), rows.weights.numpy())
        cpu.weigh(
            csr, as_array(features), squares.numpy(), numbers.numpy(), as_array(others), other_squares.numpy()
        )
        return
    block = min(pad_to_power_of_two(features.shape[1], 32), _FEATURE_BLOCK)
    with on(features):
        _weigh[(len(rows.sizes),)](features, squares, numbers, others, other_squares, rows.ids, rows.weights,
                                   rows.starts, rows.sizes, features.shape[1],
                                   BLOCK=block, num_warps=1)  # fmt: skip


def sum_to_one(rows: Members) -> SparseRows:
    """V before expansion: columns ascending on a GPU, in the order of `rows` on the CPU."""
    if not takes_triton(rows.weights):
        csr = CpuSparseRows(rows.starts.numpy(), rows.ids.numpy(), rows.weights.numpy())
        cpu.sum_to_one(csr)
        return SparseRows.of(csr)
    out = empty_rows(rows.sizes)
    with on(rows.weights):
        put_in_order(rows.ids, rows.weights, rows.starts, rows.sizes, out)
    return out


def k_reciprocal(
    features: torch.Tensor, neighbours: Neighbours, k1: int, k2: int, *, squares: torch.Tensor | None = None
) -> SparseRows:
    """V of every row, on the features' device.

    Args:
        features: (N, D) of any floating type.
        neighbours: of `self_knn(features, k1)`, every row itself first.
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
        order = together(neighbours.indices).numpy()
        return SparseRows.of(cpu.k_reciprocal(as_array(features), squares.numpy(), near, k1, k2, order))
    _require_mask(k1)
    n, columns = neighbours.indices.shape
    plan = plan_k_reciprocal(n, k1, k2, free_bytes(features.device))
    features, lists = features.contiguous(), neighbours.indices
    nearby = Nearby(lists, lists, lists)
    reciprocal = mutual(nearby, k1)
    numbers = torch.arange(n, device=features.device)
    parts = []
    with counting(n, "k-reciprocal sets", "rows") as count:
        for begin in range(0, n, plan.rows_per_pass):
            end = min(begin + plan.rows_per_pass, n)
            similarities, full = neighbours.similarities[begin:end], reciprocal.full[begin:end]
            rows = members(nearby.part(begin, end), similarities, full, reciprocal.half, k1, n)
            weigh(rows, features, squares, numbers[begin:end], features, squares)
            parts.append(sum_to_one(rows))
            del rows  # before the next takes its room
            count(end - begin)
    v = parts[0] if len(parts) == 1 else join_rows(parts)
    return v if min(k2, columns) == 1 else expand(v, lists[:, :k2].contiguous(), n)
