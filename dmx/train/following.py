"""Telling trackers of a run without waiting for them, and without ending when one of them fails.

Each has a thread of its own, since a server may take minutes to answer, or never do.
"""

from __future__ import annotations

import queue
import threading
import time

from dmx.progress import say
from dmx.train.trackers import Point, Tracker

GATHER_S = 2.0  # points are sent together, for every call may go over the network
MOST_AT_ONCE = 1000
MOST_WAITING = 100_000
LONGEST_PAUSE_S = 300.0
CLOSE_S = 60.0


class Follower:
    """A tracker in a thread. A point that cannot be sent is kept, and sent when the tracker answers again."""

    def __init__(self, tracker: Tracker, gather_s: float = GATHER_S) -> None:
        self._tracker, self._gather_s = tracker, gather_s
        self._points: queue.Queue[Point] = queue.Queue(MOST_WAITING)
        self._ending, self._failed = threading.Event(), False
        self._said: str | None = None
        self._thread = threading.Thread(target=self._work, name=f"follow-{tracker.name}", daemon=True)
        self._thread.start()

    def put(self, point: Point) -> None:
        """Tell the tracker of a step, soon."""
        try:
            self._points.put_nowait(point)
        except queue.Full:
            self._warn(f"has not answered for {MOST_WAITING} steps: later ones are left out")

    def end(self, failed: bool) -> None:
        """Begin to tell the tracker the rest, and that the run ends."""
        self._failed = failed
        self._ending.set()

    def join(self, deadline: float) -> None:
        """Wait until the tracker is told, but not beyond a time of `time.monotonic`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"does not come to an end within {CLOSE_S:.0f} s: it may lack the last steps")

    def _work(self) -> None:
        try:
            self._tracker.open()
        except BaseException as error:  # whatever it is, training goes on: SystemExit, too
            self._warn(f"cannot be told of this run ({_shown(error)}): training goes on without it")
            return
        while not self._ending.is_set():
            self._ending.wait(self._gather_s)
            self._send_all()
        self._send_all()  # what came between the last look and the end
        try:
            self._tracker.close(self._failed)
        except BaseException as error:
            self._warn(f"was not told of the end of the run ({_shown(error)})")

    def _send_all(self) -> None:
        while points := self._gathered():
            if not self._send(points):
                return

    def _gathered(self) -> list[Point]:
        points: list[Point] = []
        while len(points) < MOST_AT_ONCE and not self._points.empty():
            points.append(self._points.get_nowait())
        return points

    def _send(self, points: list[Point]) -> bool:
        """Try until it works, at growing intervals; when the run ends, once more."""
        pause_s = self._gather_s
        while True:
            is_last = self._ending.is_set()
            try:
                self._tracker.send(points)
                return True
            except BaseException as error:
                self._warn(
                    f"could not be told of some steps ({_shown(error)}): training goes on, and tries again"
                )
            if is_last:
                return False
            self._ending.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _warn(self, text: str) -> None:
        """Once for each tracker: it may fail at every step."""
        if self._said is None:
            self._said = text
            say(f"warning: {self._tracker.name} {text}")


def _shown(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
