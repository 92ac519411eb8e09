"""Rows that are equal, joined before a search and spread after it.

A thousand copies of a row would fill any buffer of candidates; joined, they cost no more than one.

    first(i) = the lowest row equal to row i

Method: a 64-bit hash of every row (the sum over columns of splitmix64 of value and place), sorted; rows next
to each other with the same hash are compared. Rows that hash alike without being equal may at worst keep
equal rows apart, which costs time and changes no result.

Shapes: features (N, D) of any floating type. Memory: 64 N bytes. Time: one pass over the features.
Source: the mixing function, Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
2014.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dmx.kernels.device import on, pad_to_power_of_two
from dmx.kernels.rescore import Best
from dmx.kernels.similarity import GRID
from dmx.kernels.sparse import starts_of

_SPREAD = 2**24  # pairs that one step of spreading sorts
_COMPARED = 2**26  # elements that one step of comparing reads


def first_equal_reference(features: torch.Tensor) -> torch.Tensor:
    """first(i), (N, D) -> (N,) int64."""
    n = len(features)
    _, group = torch.unique(features, dim=0, return_inverse=True)
    return torch.full((n,), n).scatter_reduce(0, group, torch.arange(n), "amin")[group]


@dataclass(frozen=True)
class Distinct:
    """Groups of equal rows.

    Attributes:
        rows: (U,) int64, the lowest row of every group, ascending.
        group: (N,) int64, the group of every row.
        members: (N,) int64, rows by group, ascending; starts: (U + 1,) int64.
    """

    rows: torch.Tensor
    group: torch.Tensor
    members: torch.Tensor
    starts: torch.Tensor


@triton.jit
def _hash(words, out, D, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, D, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        word = tl.load(words + row * D + c, mask=c < D, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
        z = word + (c + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = z ^ (z >> 31)
        total += tl.where(c < D, z.to(tl.int64, bitcast=True), 0)
    tl.store(out + row, tl.sum(total, 0))


def row_hashes(features: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (N,) int64; equal bits give equal hashes."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[features.element_size()]
    out = torch.empty(len(features), dtype=torch.int64, device=features.device)
    block = min(pad_to_power_of_two(features.shape[1]), 1024)
    with on(features):
        _hash[(len(features),)](features.view(integer), out, features.shape[1], BLOCK=block, num_warps=4)
    return out


def distinct(features: torch.Tensor) -> Distinct | None:
    """Groups of equal rows, or None where all rows differ."""
    hashes, order = torch.sort(row_hashes(features), stable=True)
    maybe = torch.nonzero(hashes[1:] == hashes[:-1]).flatten()
    step = max(1, _COMPARED // features.shape[1])
    same = [(features[order[at]] == features[order[at + 1]]).all(1) for at in torch.split(maybe, step)]
    if not same or not bool((joined := torch.cat(same)).any()):
        return None
    opens = torch.ones(len(features), dtype=torch.bool, device=features.device)
    opens[maybe[joined] + 1] = False
    firsts = order[opens]  # the lowest of each group, since equal hashes ascend by row
    rows, place = torch.sort(firsts)
    number = torch.empty_like(place)
    number[place] = torch.arange(len(place), device=place.device)
    group = torch.empty_like(order)
    group[order] = number[torch.cumsum(opens, 0) - 1]
    starts = starts_of(torch.bincount(group, minlength=len(rows)))
    return Distinct(rows, group, torch.argsort(group, stable=True), starts)


def spread(near: Best, groups: Distinct, wanted: torch.Tensor, k: int, own: bool) -> Best:
    """Neighbours among all rows from those among distinct rows.

    Args:
        near: (U or Q, K) best distinct rows, ids as rows of the features.
        wanted: (R,) int64, the row of `near` that each result starts from.
        k: columns of the result; own: row i leads its own list, with s = 1, and appears once.
    """
    count, device = len(wanted), near.ids.device
    out = Best.nobody(count, k, device)
    sizes, lead = groups.starts.diff(), int(own)
    longest = int(sizes.max().clamp(max=k + 1)) * near.ids.shape[1]
    step = max(1, _SPREAD // longest)
    for begin in range(0, count, step):
        some = wanted[begin : begin + step]
        group = groups.group[near.ids[some].long()]
        taken = sizes[group].clamp(max=k + 1)  # members ascend: later ones cannot come in
        taken = taken.masked_fill(near.ids[some] < 0, 0).flatten()
        source = torch.repeat_interleave(taken)
        place = torch.arange(len(source), device=device) - (taken.cumsum(0) - taken)[source]
        member = groups.members[groups.starts[group.flatten()[source]] + place]
        steps = near.steps[some].flatten()[source]
        row = source // near.ids.shape[1]
        if own:
            others = member != begin + row
            member, steps, row = member[others], steps[others], row[others]
        order = torch.argsort(member, stable=True)
        order = order[torch.argsort(steps[order], stable=True, descending=True)]
        order = order[torch.argsort(row[order], stable=True)]
        lengths = torch.bincount(row, minlength=len(some))
        rank = torch.arange(len(order), device=device) - (lengths.cumsum(0) - lengths)[row[order]]
        near_enough = rank < k - lead
        kept = order[near_enough]
        to = begin + row[kept], lead + rank[near_enough]
        out.ids[to] = member[kept].int()
        out.steps[to] = steps[kept]
    if own:
        out.ids[:, 0] = torch.arange(count, device=device)
        out.steps[:, 0] = int(GRID)
    return out
