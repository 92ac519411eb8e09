"""The pipeline on Ray Data: shards stream through decoding and the forward pass into finished parts.

    chunks of rows -> Decode (tasks, all CPUs) -> Forward (an actor per GPU or group of cores) -> write_part

Batches come out in the order of the rows (`preserve_order`), so that this process knows which is which
without looking into them: features go from the actors to the tasks that write them, and never through here.
What Ray Data may hold between the stages is limited, and so are the parts that are being written; a slow
stage makes those before it wait.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dmx.errors import DmxError
from dmx.extraction.patience import patiently
from dmx.extraction.plan import Output, Part
from dmx.extraction.stages import CHUNKS, Decode, Forward, Player, Source
from dmx.extraction.writing import write_part
from dmx.progress import progress_bar

if TYPE_CHECKING:
    from torch import nn

    from dmx.data.shards import Split

# Images of a decoding task, at most: what is done again when a worker dies.
CHUNK_IMAGES = 1024
# Cores of an actor on machines without a GPU, at most.
CORES_PER_ACTOR = 8
# Where actors need all cores, each claims this share of its own, and as many tasks decode beside them as
# there are cores: the operating system shares the cores out, decoding last.
FORWARD_SHARE = 0.75
DECODE_SHARE = 0.25
# Images of an actor from which on compiling pays. A quarter of the forward pass is saved on a CPU (see
# benchmarks/embed.py), some 10 ms an image, for about a minute. On a GPU it is assumed, not measured: 25 us.
COMPILE_FROM_CPU = 20_000
COMPILE_FROM_GPU = 3_000_000
# Batches that may lie between the stages, for every actor and for every core that decodes.
BATCHES_PER_ACTOR = 8
BATCHES_PER_CORE = 3
RETRIES = 3
PARTS_IN_WRITING = 4
# Ray Data gives up first, and tells which stage it was.
GRACE_S = 30.0
ADVICE = "Look at the machines of the cluster, and run the same command again to go on"


@dataclass(frozen=True)
class Layout:
    """How the cluster's machines are used.

    Attributes:
        actors: how many hold the model.
        cpus_per_actor: cores of each.
        has_gpus: whether each has a GPU.
        cpus: of all machines together.
    """

    actors: int
    cpus_per_actor: int
    has_gpus: bool
    cpus: int

    @property
    def is_crowded(self) -> bool:
        """Whether decoding has to share the actors' cores: without GPUs always, as all cores compute."""
        return not self.has_gpus or self.actors * self.cpus_per_actor >= self.cpus


@dataclass(frozen=True)
class Job:
    """What to embed, how, and where to.

    Attributes:
        model: on the CPU, in evaluation mode.
        split: where the images are.
        parts: those to be made.
        output: the folder.
        width: of the features, D.
        player: how an actor computes.
        stall_s: seconds without any progress after which the job ends with an error.
    """

    model: nn.Module
    split: Split
    parts: list[Part]
    output: Output
    width: int
    player: Player
    stall_s: float

    @property
    def batch_size(self) -> int:
        """Images of a forward pass, at most."""
        return self.player.batch_size


def layout(actors: int | None, cpus_per_actor: int | None) -> Layout:
    """Use every GPU of the cluster, or without one every core, in groups.

    Args:
        actors: as the user wants it; None takes all there is.
        cpus_per_actor: likewise.

    Raises:
        DmxError: the cluster has less than that.
    """
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    gpus = [int(machine.get("GPU", 0)) for machine in machines]
    if not any(cpus):
        raise DmxError("embed: wanted a Ray cluster with CPUs, found none")
    each = cpus_per_actor or (1 if any(gpus) else min(CORES_PER_ACTOR, *filter(None, cpus)))
    room = [own // each for own in cpus]
    if any(gpus):
        room = [min(pair) for pair in zip(room, gpus, strict=True)]
    wanted = actors or max(1, sum(room))
    if wanted > sum(room):
        raise DmxError(
            f"embed: wanted {wanted} actors of {each} cores{' and a GPU' if any(gpus) else ''} each, found "
            f"room for {sum(room)}: {len(machines)} machines with {sum(cpus)} cores and {sum(gpus)} GPUs; "
            "change --actors or --cpus-per-actor"
        )
    return Layout(wanted, each, any(gpus), sum(cpus))


def compiling_pays(parts: Sequence[Part], used: Layout) -> bool:
    """Whether an actor has images enough to win back the time that compiling takes."""
    images = sum(part.rows for part in parts) / used.actors
    return images > (COMPILE_FROM_GPU if used.has_gpus else COMPILE_FROM_CPU)


def run(job: Job, used: Layout) -> float:
    """Make the parts.

    Returns:
        Images a second from the first batch of features to the last, without the start.

    Raises:
        DmxError: something cannot be embedded, or nothing moves for `stall_s`; parts that are done stay.
    """
    import ray

    split_ref, model_ref = ray.put(job.split), ray.put(job.model)
    source = Source(uuid.uuid4().hex, partial(ray.get, split_ref))
    writer = ray.remote(num_cpus=0, max_retries=RETRIES)(_write)
    writing: dict[Any, Part] = {}
    pace = _Pace()
    try:
        with progress_bar(sum(part.rows for part in job.parts), "embed", "images") as bar:
            dataset = _dataset(job, used, source, partial(ray.get, model_ref))
            bundles = patiently(
                dataset.iter_internal_ref_bundles, job.stall_s + GRACE_S, f"features, in vain. {ADVICE}"
            )
            for part, refs in _collected(job, pace.timed(bundles), pace.counting(bar.update)):
                while len(writing) >= PARTS_IN_WRITING:
                    _await_one(writing, job.stall_s)
                writing[writer.remote(job.output.folder, part, source, job.width, *refs)] = part
            while writing:
                _await_one(writing, job.stall_s)
    except ray.exceptions.RayError as error:
        raise told(error) from error
    return pace.rate


class _Pace:
    """Counts images, and the time since the first ones came."""

    def __init__(self) -> None:
        self._images = self._first = 0
        self._start = self._now = 0.0

    def timed(self, bundles: Iterable[Any]) -> Iterator[Any]:
        """Note when each bundle comes."""
        for bundle in bundles:
            self._now = time.perf_counter()
            self._start = self._start or self._now
            yield bundle

    def counting(self, advance: Callable[[int], object]) -> Callable[[int], None]:
        """Count images and pass their number on."""

        def count(images: int) -> None:
            self._images += images
            if self._now == self._start:
                self._first += images
            advance(images)

        return count

    @property
    def rate(self) -> float:
        """Images a second, those of the first bundle and the wait for it left out."""
        return (self._images - self._first) / max(self._now - self._start, 1e-9)


def _dataset(job: Job, used: Layout, source: Source, load_model: Callable[[], nn.Module]) -> Any:
    """The pipeline up to the features, a block for some batches of one chunk."""
    import ray.data
    from ray.data import ActorPoolStrategy

    player = job.player
    decode = Decode(source, player.height, player.width, job.batch_size, is_nice=used.is_crowded)
    batch_bytes = job.batch_size * player.height * player.width * 3
    decoders = used.cpus if used.is_crowded else used.cpus - used.actors * used.cpus_per_actor
    configure(batch_bytes, BATCHES_PER_ACTOR * used.actors + BATCHES_PER_CORE * decoders, job.stall_s)
    chunks = chunked(job.parts, job.batch_size, decoders)
    forward_claim, decode_claim = (FORWARD_SHARE, DECODE_SHARE) if used.is_crowded else (1, 1)
    return (
        ray.data.from_blocks(chunks)
        .map_batches(decode, batch_size=None, batch_format="pyarrow", num_cpus=decode_claim)
        .map_batches(
            Forward,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(load_model, player, source),
            compute=ActorPoolStrategy(size=used.actors),
            num_cpus=forward_claim * used.cpus_per_actor,
            num_gpus=1 if used.has_gpus else 0,
        )
    )


def configure(batch_bytes: int, batches: int, stall_s: float, *, in_order: bool = True) -> None:
    """Settings of Ray Data in this process, for what is run next.

    Args:
        batch_bytes: size of a decoded batch.
        batches: how many may lie between the stages.
        stall_s: seconds without progress after which Ray Data gives up.
        in_order: whether results come in the order of the input.
    """
    import logging

    from ray.data import DataContext, ExecutionResources

    context = DataContext.get_current()
    options = context.execution_options
    options.preserve_order = in_order
    options.resource_limits = ExecutionResources.for_limits(object_store_memory=batch_bytes * batches)
    context.execution_options = options
    # A block for every batch: what is decoded goes on at once.
    context.target_max_block_size = max(1, batch_bytes // 2)
    context.execution_no_progress_timeout_s = stall_s
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.util"):
        # Errors too: they are raised here, and told once.
        logging.getLogger(name).setLevel(logging.CRITICAL)


def chunked(parts: Sequence[Part], batch_size: int, decoders: int) -> list[Any]:
    """The parts cut into tables of one chunk each: whole batches, small enough to busy all that decode."""
    batches = sum(-(-part.rows // batch_size) for part in parts)
    size = batch_size * max(1, min(CHUNK_IMAGES // batch_size, batches // (4 * decoders)))
    return [
        pa.table(
            {"part": [part.index], "begin": [begin], "end": [min(begin + size, part.end)]}, schema=CHUNKS
        )
        for part in parts
        for begin in range(part.begin, part.end, size)
    ]


def _collected(
    job: Job, bundles: Iterable[Any], advance: Callable[[int], object]
) -> Iterator[tuple[Part, list[Any]]]:
    """Each part with the references to its batches, once all have come."""
    batches = (
        (part, min(job.batch_size, part.end - begin))
        for part in job.parts
        for begin in range(part.begin, part.end, job.batch_size)
    )
    refs: list[Any] = []
    left, current = 0, None
    for bundle in bundles:
        for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
            if metadata.num_rows:
                refs.append(ref)
            for part, images in itertools.islice(batches, metadata.num_rows):
                if part is not current:
                    current, left = part, part.rows
                left -= images
                advance(images)
                if not left:
                    yield part, refs
                    # A block may hold batches of the next part, too.
                    refs = refs[-1:]
    if left or next(batches, None) is not None:
        raise DmxError("embed: Ray Data ended before all batches had come; run the same command again")


def _write(folder: str, part: Part, source: Source, width: int, *batches: Any) -> None:
    write_part(Output(folder), part, source.split(), width, batches)


def _await_one(writing: dict[Any, Part], stall_s: float) -> None:
    """Wait for one of the parts that are being written."""
    import ray

    done, _ = ray.wait(list(writing), num_returns=1, timeout=stall_s)
    if not done:
        names = ", ".join(part.name for part in writing.values())
        raise DmxError(f"waited {stall_s:.0f} s for {names} to be written, in vain. {ADVICE}")
    writing.pop(done[0])
    ray.get(done[0], timeout=stall_s)


def told(error: BaseException) -> DmxError:
    """What went wrong on another machine, as it was said there.

    Args:
        error: as Ray raises it: with a class of its own that inherits the original's, and a text that begins
            with tracebacks.
    """
    from ray.exceptions import RayError

    cause: BaseException | None = error
    while isinstance(cause, RayError):
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(cause, DmxError):
        # Ray Data adds how often it tried, and how it could be made to try again.
        return DmxError(str(cause).split("\nFailed to apply UDF")[0])
    return DmxError(f"{error}\n{ADVICE}")
