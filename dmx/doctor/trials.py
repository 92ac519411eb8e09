"""Trials in another process: what is broken may raise, abort, print or hang there, and is only reported.

What does not work ends the process, since what comes after would suffer by it: half of a package stays
imported, and a kernel that reads beyond its memory makes every later call of CUDA fail. What is left is tried
in a new process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_MOST = 300  # characters that an error may take


@dataclass(frozen=True)
class Task:
    """Something to try.

    Attributes:
        name: unlike that of any other task.
        function: `module:function`; returns what JSON can hold, None for: there is nothing to try.
        arguments: of the function, as JSON can hold them.
        needs: names of earlier tasks without which it is not tried.
    """

    name: str
    function: str
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Attributes:
        result: what the function returned.
        error: one line, where it failed.
        tried: False where something else was missing that it needs.
        seconds: it took; 0 where it did not return.
    """

    result: Any = None
    error: str | None = None
    tried: bool = True
    seconds: float = 0.0

    @property
    def works(self) -> bool:
        """It was there and did not fail."""
        return self.result is not None


def attempt(tasks: Sequence[Task], timeout_s: float) -> dict[str, Outcome]:
    """Carry out the tasks in their order.

    Args:
        tasks: what to try.
        timeout_s: seconds that a process gets; the task it was at by then has failed.

    Returns:
        The outcome of every task by its name.
    """
    outcomes: dict[str, Outcome] = {}
    while True:
        for task in tasks:
            if lacking := [need for need in task.needs if need in outcomes and not outcomes[need].works]:
                error = f"not tried, since {lacking[0]} does not work"
                outcomes.setdefault(task.name, Outcome(error=error, tried=False))
        left = [task for task in tasks if task.name not in outcomes]
        if not left:
            return outcomes
        outcomes |= _in_a_process(left, timeout_s)


def one_line(error: BaseException | str) -> str:
    """An error as a line; of long ones the beginning and the end, where compilers say what is wrong."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
    text = " ".join(text.split())
    if len(text) <= _MOST:
        return text
    return f"{text[: _MOST // 2].rstrip()} ... {text[-_MOST // 2 :].lstrip()}"


def _in_a_process(tasks: Sequence[Task], timeout_s: float) -> dict[str, Outcome]:
    """The outcomes of the first tasks: up to the first that does not work, or all; at least one."""
    # -P: what lies in the current folder is no package.
    command = [sys.executable, "-P", "-m", "dmx.doctor.trials", json.dumps([asdict(task) for task in tasks])]
    # Not a file: the disk may be what is broken.
    with os.fdopen(os.memfd_create("errors"), "w+b") as errors:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, timeout=timeout_s,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as late:
            answers, ending = late.stdout or b"", f"did not return within {timeout_s:g} s"
        else:
            errors.seek(0)
            answers, ending = done.stdout, _ending(done.returncode, errors.read())
    # What stands behind the last line break was cut off.
    found = [Outcome(**json.loads(line)) for line in answers.split(b"\n")[:-1]]
    if len(found) < len(tasks) and all(outcome.works for outcome in found):
        found.append(Outcome(error=ending))
    return {task.name: outcome for task, outcome in zip(tasks, found, strict=False)}


def _ending(status: int, errors: bytes) -> str:
    """How a process ended that did not answer, and its last words."""
    how = f"its process was ended by signal {-status} ({signal.strsignal(-status)})" if status < 0 else (
        f"its process ended with status {status}"
    )  # fmt: skip
    lines = errors.decode(errors="replace").strip().splitlines()
    return one_line(f"{how}: {lines[-1]}" if lines else how)


def main() -> None:
    """Be the other process: a line of JSON on stdout for every task."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what packages print is no answer
    for task in json.loads(sys.argv[1]):
        outcome = _outcome(task["function"], task["arguments"])
        print(json.dumps(asdict(outcome)), file=answers, flush=True)
        if not outcome.works:
            break
    os._exit(0)  # what packages do at the end is none of their tasks, and may fail too


def _outcome(function: str, arguments: Sequence[str]) -> Outcome:
    module, name = function.split(":")
    start = time.perf_counter()
    try:
        result = getattr(importlib.import_module(module), name)(*arguments)
    except (Exception, SystemExit) as error:  # whatever it is, it is what has to be reported
        return Outcome(error=one_line(error))
    return Outcome(result, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
