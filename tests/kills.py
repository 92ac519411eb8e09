"""Commands struck at random moments: how they are struck, and what they must have left and must come to."""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from killed_jobs import JOBS, Job

__all__ = ["JOBS", "Job", "Outcome", "Strike", "Undisturbed", "memory_limit", "strike", "undisturbed"]

PATIENCE_S = 300.0  # for a command to end by itself
PROMISED_S = 10.0  # from SIGTERM or SIGINT to the end
LINGER_S = 10.0  # for the processes of one that was killed to follow it
POLL_S = 0.01
MOST_RESTARTS = 4
MOST_SHARE, LEAST_SHARE = 1.0, 0.1  # of its time, in which a command is struck
EARLY_SHARE = 0.2  # of the moments are drawn from the start of the process on
MEMORY_V2, MEMORY_V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Strike:
    """What befalls a command.

    Attributes:
        name: what it is called.
        signum: the signal that it gets; None for want of memory.
        whole_group: whether all processes of its group get it.
    """

    name: str
    signum: int | None
    whole_group: bool = False

    @property
    def is_polite(self) -> bool:
        """Whether the command can end as it likes."""
        return self.signum in POLITE


POLITE = (signal.SIGTERM, signal.SIGINT)
KERNEL_KILLS, ALLOCATION_FAILS = "out of memory: killed", "out of memory: allocation fails"
STRIKES = (
    Strike("SIGKILL to the group", signal.SIGKILL, True),
    Strike("SIGTERM", signal.SIGTERM),
    Strike(KERNEL_KILLS, None),
    Strike("SIGKILL", signal.SIGKILL),
    Strike("SIGTERM to the group", signal.SIGTERM, True),
    Strike(ALLOCATION_FAILS, None),
    Strike("SIGINT to the group", signal.SIGINT, True),
)


@dataclass(frozen=True)
class Undisturbed:
    """A command's result when nothing befalls it, and when it writes.

    Attributes:
        out: its results.
        begins_s: from its start to the first thing it wrote, seconds.
        ends_s: from its start to where it answers no signals any more, since all is written, seconds.
        total_s: from its start to its end, seconds.
        keeps: names in the folder for temporary files that it leaves there, for later commands.
    """

    out: Path
    begins_s: float
    ends_s: float
    total_s: float
    keeps: frozenset[str]


@dataclass
class Outcome:
    """What a strike came to.

    Attributes:
        strike: what befell the command.
        at_s: when, after its start, seconds.
        where: `starting` before it wrote anything, `at work`, `ending` when it had written everything, or
            `through` when it ended well all the same.
        status: how it ended.
        end_s: from the strike to its end, seconds.
        heard: whether it was up far enough to answer a signal.
        restarts: how often it was given again until it was through.
        partial: final names that are not whole.
        differences: from the undisturbed result.
        leaks: what was left.
        rude: what it should not have said, or not have left unsaid, when it was stopped, and an end that was
            longer in coming than is promised.
    """

    strike: Strike
    at_s: float
    where: str
    status: int
    end_s: float
    heard: bool = False
    restarts: int = 0
    partial: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    rude: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """All that is not as promised."""
        return self.partial + self.differences + self.leaks + self.rude


def memory_limit() -> str | None:
    """Which control groups can limit memory here: `cgroup v2`, `cgroup v1`, or none."""
    controllers = MEMORY_V2 / "cgroup.subtree_control"
    if controllers.exists() and "memory" in controllers.read_text() and os.access(MEMORY_V2, os.W_OK):
        return "cgroup v2"
    if (MEMORY_V1 / "memory.limit_in_bytes").exists() and os.access(MEMORY_V1, os.W_OK):
        return "cgroup v1"
    return None


class Command:
    """A command that runs, with all processes that belong to it."""

    def __init__(self, job: Job, out: Path, group: Path | None = None) -> None:
        self.out, self.errors = out, out.with_suffix(".err")
        self._temporary = out.with_name(f"{out.name}-tmp")
        self._temporary.mkdir(exist_ok=True)
        self._mark = f"DMX_KILL={out.name}-{time.monotonic_ns()}"
        name, _, value = self._mark.partition("=")
        environment = os.environ | {name: value, "TMPDIR": str(self._temporary)}
        self._shared = set(SHARED_MEMORY.iterdir())
        joins = None if group is None else (lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
        self.start = time.monotonic()
        with open(self.errors, "ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dmx", *job.words, *job.place(out)],
                cwd=job.folder, env=environment, stdout=errors, stderr=errors, start_new_session=True,
                preexec_fn=joins,
            )  # fmt: skip

    def wait_until(self, moment: float) -> bool:
        """Whether the command still runs at a moment of its time."""
        while self.process.poll() is None:
            if time.monotonic() - self.start >= moment:
                return True
            time.sleep(POLL_S)
        return False

    def await_end(self) -> float:
        """The seconds that it takes to end."""
        start = time.monotonic()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
            with open(self.errors, "a") as errors:
                errors.write(f"\nTraceback: did not end within {PATIENCE_S} s\n")
        return time.monotonic() - start

    def kill(self) -> None:
        """End its main process."""
        os.kill(self.process.pid, signal.SIGKILL)

    def others(self) -> list[str]:
        """The processes that belong to it and run, but for its main one."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(folder.name) == self.process.pid or fields[0] in "ZX":
                    continue
                is_ours = int(fields[3]) == self.process.pid
                if is_ours or self._mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"process {words[:120]}")
        return found

    def kept(self) -> frozenset[str]:
        """What lies in its folder for temporary files."""
        return frozenset(path.name for path in self._temporary.iterdir())

    def leaks(self, keeps: frozenset[str]) -> list[str]:
        """Processes, shared memory and temporary files that are left; each has LINGER_S to go."""
        deadline = time.monotonic() + LINGER_S
        while True:
            found = self.others()
            new = set(SHARED_MEMORY.iterdir()) - self._shared
            found += [str(path) for path in [*new, *ray_folders(self.process.pid)] if not is_held(path)]
            found += [str(self._temporary / name) for name in self.kept() - keeps]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def remove(self) -> None:
        """Remove its temporary folder and what it said."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        self.errors.unlink()


def ray_folders(pid: int) -> list[Path]:
    """The folders in /tmp of a process that started Ray, whose sessions are named after it."""
    return [session.parent for session in Path("/tmp").glob(f"dmx-ray-*/session_*_{pid}")]


def is_held(path: Path) -> bool:
    """Whether any process has a file, or one below it, open or in its memory."""
    text = str(path)
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if text in (folder / "maps").read_text(errors="replace"):
                return True
            if any(os.readlink(handle).startswith(text) for handle in (folder / "fd").iterdir()):
                return True
    return False


def undisturbed(job: Job) -> Undisturbed:
    """The command's result when nothing befalls it. It runs twice: the first fills caches on the disk."""
    for name in ("warm", "whole"):
        command = Command(job, job.folder / f"{job.name}-{name}")
        begins_s = ends_s = 0.0
        while command.process.poll() is None:
            if not begins_s and job.begun(command.out):
                begins_s = time.monotonic() - command.start
            if _handles(command.process.pid):
                ends_s = time.monotonic() - command.start
            time.sleep(POLL_S)
        total_s = time.monotonic() - command.start
        if command.process.returncode:
            raise RuntimeError(f"{job.name}: {command.errors.read_text()}")
        keeps = command.kept()
        command.remove()
        if name == "warm":
            shutil.rmtree(command.out)
    return Undisturbed(command.out, begins_s, ends_s, total_s, keeps)


def strike(job: Job, whole: Undisturbed, number: int, rng: random.Random) -> Outcome:
    """Strike the command once, give it again until it is through, and look at everything."""
    how = STRIKES[number % len(STRIKES)]
    out = job.folder / f"{job.name}-{number}"
    share = MOST_SHARE
    while True:  # until it is struck before it is through, which takes it longer or less
        command, outcome = _struck(job, whole, how, out, share, rng)
        # It may need no more memory than it has, or start again what was killed for want of it.
        survived = outcome.heard and how.name in (ALLOCATION_FAILS, *(KERNEL_KILLS,) * job.heals)
        if outcome.where != "through" or survived or share < LEAST_SHARE:
            break
        shutil.rmtree(out)
        command.remove()
        share /= 2
    outcome.partial = job.partial(out, whole.out)
    if how.is_polite and outcome.heard:
        outcome.rude = rudeness(command, how)
        if outcome.end_s > PROMISED_S:
            outcome.rude.append(f"took {outcome.end_s:.1f} s to end")
    elif outcome.end_s >= PATIENCE_S:
        outcome.rude = [f"did not end within {PATIENCE_S:.0f} s: {command.errors.read_text()[-400:]}"]
    last = command
    while last.process.returncode and not _is_whole(job, out, whole):
        if outcome.restarts == MOST_RESTARTS:
            outcome.differences = [f"is never through: {last.errors.read_text()[-600:]}"]
            break
        last = Command(job, out)
        last.await_end()
        outcome.restarts += 1
    outcome.differences = outcome.differences or job.differences(out, whole.out)
    outcome.leaks = sorted({*command.leaks(whole.keeps), *last.leaks(whole.keeps), *job.left(out)})
    if not outcome.faults:
        shutil.rmtree(out)
        last.remove()
    return outcome


def _is_whole(job: Job, out: Path, whole: Undisturbed) -> bool:
    """Whether a command would refuse to write the results again, since they are all there."""
    return job.refuses and out.exists() and not job.differences(out, whole.out)


def _struck(
    job: Job, whole: Undisturbed, how: Strike, out: Path, share: float, rng: random.Random
) -> tuple[Command, Outcome]:
    """The command, started and struck within this share of its time, and how it ended."""
    group = _memory_group() if how.name == KERNEL_KILLS else None
    command = Command(job, out, group)
    try:
        is_early = rng.random() < EARLY_SHARE
        if not is_early:
            while not job.begun(out) and command.process.poll() is None:
                time.sleep(POLL_S)
        now = time.monotonic() - command.start
        work_s = whole.ends_s if is_early else whole.ends_s - whole.begins_s
        runs = command.wait_until((0 if is_early else now) + rng.uniform(0, share * work_s))
        at_s, begun = time.monotonic() - command.start, job.begun(out)
        heard = runs and _handles(command.process.pid)
        if runs:
            _hit(command, how, group)
        end_s = command.await_end()
        status = command.process.returncode
        where = "starting" if not begun else "at work" if heard else "ending"
        return command, Outcome(how, at_s, where if status else "through", status, end_s, heard)
    finally:
        if group is not None:
            _remove_group(group)


def _handles(pid: int) -> bool:
    """Whether a process handles SIGTERM, as the kernel knows."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _hit(command: Command, how: Strike, group: Path | None) -> None:
    pid = command.process.pid
    with suppress(ProcessLookupError):
        if how.signum is not None:
            (os.killpg if how.whole_group else os.kill)(pid, how.signum)
        elif group is not None:
            _run_out(command, group)
        else:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
            least = pages * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (least, least))


def _memory_group() -> Path | None:
    """A control group of its own, whose memory can be limited."""
    kind = memory_limit()
    if kind is None:
        return None
    group = (MEMORY_V2 if kind == "cgroup v2" else MEMORY_V1) / f"dmx-kill-{os.getpid()}"
    group.mkdir(exist_ok=True)
    return group


def _run_out(command: Command, group: Path) -> None:
    """Limit the group to what it uses, until the kernel has killed a process of it; then lift the limit."""
    is_v2 = (group / "memory.max").exists()
    limit, usage, events = (
        group / name
        for name in (
            ("memory.max", "memory.current", "memory.events")
            if is_v2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control")
        )
    )

    def killed() -> int:
        return sum(
            int(line.split()[1]) for line in events.read_text().splitlines() if line.startswith("oom_kill ")
        )

    before = killed()
    for spare in itertools.chain((0,), itertools.repeat(1 << 18)):
        with suppress(OSError):  # v1 does not go below what it cannot take back
            limit.write_text(str(int(usage.read_text()) // (2 if is_v2 else 1) + spare))
        for _ in range(20):
            if killed() > before or command.process.poll() is not None:
                limit.write_text("max" if is_v2 else "-1")
                return
            time.sleep(POLL_S)


def _remove_group(group: Path) -> None:
    for _ in range(200):
        with suppress(OSError):
            for pid in (group / "cgroup.procs").read_text().split():
                (group.parent / "cgroup.procs").write_text(pid)
            group.rmdir()
            return
        time.sleep(POLL_S)


def rudeness(command: Command, how: Strike) -> list[str]:
    """What is wrong with how a command that heard a signal ended."""
    text, found = command.errors.read_text(errors="replace"), []
    wanted = {128 + how.signum, 0} if how.signum else set()
    if command.process.returncode not in wanted:
        found.append(f"status {command.process.returncode}: {text[-400:]}")
    elif command.process.returncode and f"stopped by {signal.Signals(how.signum).name}" not in text:
        found.append(f"does not say by what it was stopped: {text[-400:]}")
    if "by force" in text:
        found.append(f"did not end by itself: {text[-400:]}")
    if "Traceback" in text:
        found.append(f"a traceback: {text[text.index('Traceback') :][:600]}")
    return found
