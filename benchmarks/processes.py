"""What a process and all that it started take: memory, open files, threads, shared memory, time of cores.

Read from /proc. Reading the memory of a process stops it from taking more meanwhile, so it is done once a
second or less. What is between two readings is missed; the highest resident size of each process is kept by
the kernel and misses nothing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

PAGE_FIELDS = {"Pss_Anon": "own_bytes", "Pss_File": "mapped_bytes", "Pss_Shmem": "shared_bytes"}
SHARED_MEMORY = "/dev/shm/"
BLOCK_BYTES = 512  # in which stat counts
SET_DEATH_SIGNAL = 1  # of prctl, see linux/prctl.h
TICKS_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass
class Usage:
    """Of all processes together, but for the last.

    Attributes:
        processes: how many there are.
        own_bytes: memory that lies in no file: heaps, stacks, arrays.
        mapped_bytes: pages of files, programs and memory-mapped shards: page cache that the system can drop.
        shared_bytes: shared memory: what they have mapped of it, or its files that they hold open in
            /dev/shm, whichever is more.
        handles: open files, sockets and pipes.
        maps: pieces of address space, of files and of the allocator.
        mapped_files: those that files take.
        threads: of all.
        largest_bytes: the highest resident size, pages of files and shared memory included, that any one
            process has had since it began.
    """

    processes: int = 0
    own_bytes: int = 0
    mapped_bytes: int = 0
    shared_bytes: int = 0
    handles: int = 0
    maps: int = 0
    mapped_files: int = 0
    threads: int = 0
    largest_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Memory that the system cannot take back: own and shared."""
        return self.own_bytes + self.shared_bytes

    def raised_to(self, other: Usage) -> Usage:
        """The larger of both in every field; `held_bytes` of it may be more than was ever held at a time."""
        return Usage(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def tree(self) -> dict[str, int]:
        """All fields, for JSON."""
        return asdict(self) | {"held_bytes": self.held_bytes}


def family(root: int) -> list[int]:
    """A process and all it started, whatever session they moved to."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        process = todo.pop()
        todo += children.get(process, [])
        found.append(process)
    return found


def usage(root: int) -> Usage:
    """What a process and all it started take now; zeros where it has ended."""
    total = Usage()
    shared_files: dict[tuple[int, int], int] = {}
    for process in family(root):
        try:
            _add(total, Path(f"/proc/{process}"), shared_files)
        except (OSError, KeyError):  # it has just ended, and gives back what it had
            continue
    total.shared_bytes = max(total.shared_bytes, sum(shared_files.values()))
    return total


def _add(total: Usage, folder: Path, shared_files: dict[tuple[int, int], int]) -> None:
    """Add a process, by its folder in /proc, and the sizes of files in shared memory by their number.

    Raises:
        OSError, KeyError: it ends meanwhile; nothing is added.
    """
    pages, status = dict(_kib(folder / "smaps_rollup")), dict(_kib(folder / "status"))
    taken = {attribute: pages[name] for name, attribute in PAGE_FIELDS.items()}
    largest, threads = status["VmHWM"], len(os.listdir(folder / "task"))
    maps, handles = (folder / "maps").read_bytes().splitlines(), os.listdir(folder / "fd")
    for handle in handles:
        try:
            if os.readlink(folder / "fd" / handle).startswith(SHARED_MEMORY):
                file = (folder / "fd" / handle).stat()
                shared_files[file.st_dev, file.st_ino] = file.st_blocks * BLOCK_BYTES
        except OSError:  # closed meanwhile
            continue
    for attribute, size in taken.items():
        setattr(total, attribute, getattr(total, attribute) + size)
    total.processes += 1
    total.threads += threads
    total.maps += len(maps)
    total.mapped_files += sum(map(_is_of_a_file, maps))
    total.handles += len(handles)
    total.largest_bytes = max(total.largest_bytes, largest)


def own_bytes(process: int) -> int:
    """Memory of one process that lies in no file; 0 where it has ended."""
    try:
        return dict(_kib(Path(f"/proc/{process}/smaps_rollup"))).get("Pss_Anon", 0)
    except OSError:
        return 0


def _is_of_a_file(piece: bytes) -> bool:
    """Whether a line of /proc/PID/maps tells an inode."""
    return piece.split(maxsplit=5)[4] != b"0"


def _kib(path: Path) -> Iterator[tuple[str, int]]:
    """The lines of a file in /proc that tell a size, as names and bytes."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            yield name, 1024 * int(value.split()[0])


def cpu_seconds(root: int) -> dict[int, float]:
    """Seconds of cores that each process of a family has taken so far, by its number."""
    found = {}
    for process in family(root):
        try:
            times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            continue
        found[process] = TICKS_S * sum(map(int, times))
    return found


def processor() -> str:
    """The processor's name, as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however it does."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGTERM)


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take, in whole blocks; of those that are gone meanwhile, nothing."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                total += (
                    disk_bytes(Path(entry.path)) if entry.is_dir() else entry.stat().st_blocks * BLOCK_BYTES
                )
    return total
