"""Frames out of a video file, in the order in which they are shown, by FFmpeg (PyAV).

What FFmpeg decodes is read, whatever container or codec. A frame is turned as the file says that it is to be
shown (phones lie on their side). What is damaged is left out; the frames after it keep their numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmx.errors import DmxError

# What may be missing of what a header tells before a video counts as cut short: sound may be longer than the
# pictures, and editors leave frames out.
CUT_SHORT_S, CUT_SHORT_FRAMES = 2.0, 4
CUT_SHORT_SHARE = 0.02

# A playlist that is called a video leads nowhere else.
LOCAL = {"protocol_whitelist": "file"}


@dataclass(frozen=True)
class Frame:
    """A frame: number from 0, seconds since the first (NaN: not told), pixels (H, W, 3) uint8 RGB."""

    number: int
    time_s: float
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Stride:
    """Which frames are wanted: every so many-th, or the first in each `1 / fps` seconds."""

    every: int | None = None
    fps: float | None = None


@dataclass
class Condition:
    """What was wrong with a video; complete once its frames are exhausted.

    Attributes:
        frames: decoded in all.
        end_s: time of the last, seconds.
        damaged: frames that cannot be decoded.
        first_damaged: number of the first of them.
        stopped: why reading ended before the file did; empty: it did not.
    """

    frames: int = 0
    end_s: float = 0.0
    damaged: int = 0
    first_damaged: int = -1
    stopped: str = ""


@dataclass
class Video:
    """An open video file.

    Attributes:
        path: of the file.
        frame_count: as the container tells; 0 where it does not.
        duration_s: as the container tells; 0 where it does not.
        rate: frames a second, on average; 0 where it is not known.
        condition: what is wrong with it, as far as it was read.
    """

    path: Path
    frame_count: int
    duration_s: float
    rate: float
    condition: Condition = field(default_factory=Condition)

    def expected(self, stride: Stride) -> int | None:
        """About how many frames are wanted, or None where nothing tells."""
        count = self.frame_count or round(self.duration_s * self.rate)
        if stride.every is not None:
            return math.ceil(count / stride.every) if count else None
        length_s = self.duration_s or (count / self.rate if self.rate else 0.0)
        if not length_s or stride.fps is None:
            return None
        wanted = math.ceil(length_s * stride.fps)
        return min(wanted, count) if count else wanted

    def frames(self, stride: Stride) -> Iterator[Frame]:
        """The wanted frames. Damaged ones are left out and counted in `condition`.

        Raises:
            DmxError: `stride` goes by time, and a frame has none.
        """
        with _opened(self.path) as (container, stream):
            stream.thread_type = "AUTO"
            yield from self._wanted(self._decoded(container, stream), stream.time_base, stride)

    def _decoded(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """Number and frame of every frame that can be decoded."""
        number = 0
        for packet in self._packets(container, stream):
            try:
                frames = stream.decode(packet)
            except import_av().FFmpegError:
                # Mostly a packet is a frame, so that those behind it keep their numbers.
                self._note_damage(number)
                number += 1
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._note_damage(number)
                else:
                    yield number, frame
                number += 1

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Of the video; None at the end, which brings out what the decoder holds back."""
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except import_av().FFmpegError as error:
                self.condition.stopped = _reason(error)
                packet = None
            if packet is None or packet.size == 0:
                break
            yield packet
        yield None

    def _note_damage(self, number: int) -> None:
        if self.condition.damaged == 0:
            self.condition.first_damaged = number
        self.condition.damaged += 1

    def _wanted(
        self, decoded: Iterator[tuple[int, Any]], time_base: Fraction, stride: Stride
    ) -> Iterator[Frame]:
        first, slot = None, -1
        for number, frame in decoded:
            first = frame.pts if first is None else first
            time_s = math.nan if frame.pts is None else float((frame.pts - first) * time_base)
            self.condition.frames, self.condition.end_s = number + 1, time_s
            if stride.every is not None:
                if number % stride.every:
                    continue
            elif math.isnan(time_s):
                raise DmxError(
                    f"{self.path}: frame {number}: wanted its time, found that the video does not tell it; "
                    "choose frames with --every N instead of --fps"
                )
            else:
                # A hair's breadth, since 0.2 s times 5 is not always 1.
                now = math.floor(time_s * (stride.fps or 0.0) + 1e-6)
                if now <= slot:
                    continue
                slot = now
            yield Frame(number, time_s, _as_shown(frame))

    def complaints(self) -> list[str]:
        """What was wrong with it, once it was read: sentences for the user."""
        found, said = self.condition, []
        if found.damaged:
            frames = "1 frame" if found.damaged == 1 else f"{found.damaged:,} frames"
            said.append(
                f"{self.path}: {frames} cannot be decoded, the first is frame {found.first_damaged}; left out"
            )
        if found.stopped:
            said.append(
                f"{self.path}: reading ended behind frame {found.frames - 1} ({found.end_s:.1f} s): "
                f"{found.stopped}; what is before it is kept"
            )
        elif short := self._cut_short():
            said.append(
                f"{self.path}: the video ends with frame {found.frames - 1} ({found.end_s:.1f} s), although "
                f"its header tells of {short}: it is cut short or damaged; what is there is kept"
            )
        return said

    def _cut_short(self) -> str:
        if self.frame_count:
            missing = self.frame_count - self.condition.frames
            allowed = max(CUT_SHORT_FRAMES, CUT_SHORT_SHARE * self.frame_count)
            return f"{self.frame_count:,} frames" if missing > allowed else ""
        allowed = max(CUT_SHORT_S, CUT_SHORT_SHARE * self.duration_s)
        return f"{self.duration_s:.1f} s" if self.duration_s - self.condition.end_s > allowed else ""


def open_video(path: Path) -> Video:
    """Look into a file, without decoding it.

    Raises:
        DmxError: FFmpeg finds no video in it; says what it found.
    """
    with _opened(path) as (container, stream):
        duration = container.duration
        rate = stream.average_rate or stream.guessed_rate
        return Video(
            path=path,
            frame_count=int(stream.frames or 0),
            duration_s=0.0 if duration is None else duration / import_av().time_base,
            rate=float(rate) if rate else 0.0,
        )


def import_av() -> ModuleType:
    """PyAV, which is not among the dependencies of DMX.

    Raises:
        DmxError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise DmxError(
            'wanted PyAV, which decodes videos, found that it is not installed; `pip install "dmx[video]"` '
            "brings it, as does `pip install av`"
        ) from error
    module: ModuleType = av
    return module


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open container and its video stream: the first that is no cover picture."""
    av = import_av()
    size = path.stat().st_size
    if size == 0:
        raise DmxError(f"{path}: wanted a video, found an empty file (zero bytes); record or copy it again")
    try:
        container = av.open(str(path), options=LOCAL)
    except (av.FFmpegError, ValueError) as error:
        raise DmxError(
            f"{path}: wanted a video, found {size:,} bytes that FFmpeg cannot open: {_reason(error)}. If it "
            "is one, it is damaged or was cut off before its index was written at the end: copy it again, or "
            "mend it with a tool for that"
        ) from error
    with container:
        streams = [
            s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
            raise DmxError(f"{path}: wanted a video, found a file with {' and '.join(kinds)} but no pictures")
        if streams[0].codec_context is None:
            raise DmxError(
                f"{path}: wanted a video that FFmpeg can decode, found a codec that it does not know; "
                "convert it to H.264"
            )
        yield container, streams[0]


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _as_shown(frame: Any) -> NDArray[np.uint8]:
    """RGB, turned anticlockwise as the display matrix says."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels
