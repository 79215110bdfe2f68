"""Matrices as grey pictures, and pictures as a video of intra frames, through PyAV.

Settings are those that serve squared error, not eyes: no adaptive quantisation, deblocking or psychovisual terms, a
constant QP. Inter prediction is off: the paper measured that it costs bits. Threads are pinned to one, since their
number changes the bytes.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from dlcm.codec.blob import CodecError, require

LARGEST, MULTIPLE = 4096, 16  # entries of a side of a frame
MOST_PADDING = 0.02  # of a matrix
X264 = (
    "keyint=1:aq-mode=0:no-deblock=1:psy=0:ipratio=1:8x8dct=1:trellis=2:cabac=1:no-mbtree=1:scenecut=0:"
    "threads=1:qp={qp}"
)
X265 = (
    "keyint=1:min-keyint=1:bframes=0:scenecut=0:aq-mode=0:cutree=0:no-deblock=1:no-sao=1:psy-rd=0:psy-rdoq=0:"
    "no-strong-intra-smoothing=1:rc-lookahead=0:ipratio=1.0:info=0:pools=none:frame-threads=1:log-level=none:qp={qp}"
)
NEUTRAL = 128  # chroma of grey, of 8 bits


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder of PyAV.

    Attributes:
        stream: what it writes, h264 or hevc.
        formats: of its pictures, by bits of a sample.
        options: handed to it; {qp} is the quantiser's.
        deep_qp: whether two more bits of depth add 12 to its QP.
    """

    name: str
    stream: str
    formats: dict[int, str]
    options: dict[str, str]
    deep_qp: bool = False

    def least_qp(self, depth: int) -> int:
        """Of a step that is no finer than a sample."""
        return max(0, math.ceil(self.qp_of(1.0, depth)))

    def most_qp(self, depth: int) -> int:
        return 51 + self._shift(depth)

    def qp_of(self, step: float, depth: int) -> float:
        """The QP, not rounded, whose quantiser has this step, in samples: it doubles every 6."""
        return 4 + 6 * math.log2(step) - 6 * (depth - 8) + self._shift(depth)

    def _shift(self, depth: int) -> int:
        return 6 * (depth - 8) if self.deep_qp else 0


ENCODERS = {
    "x264": Encoder(
        "libx264",
        "h264",
        {8: "gray", 10: "gray10le"},
        {"preset": "ultrafast", "x264-params": X264},
        deep_qp=True,
    ),
    "x265": Encoder("libx265", "hevc", {8: "gray", 10: "gray10le"}, {"preset": "medium", "x265-params": X265}),
    "nvenc": Encoder(
        "hevc_nvenc",
        "hevc",
        {8: "nv12", 10: "p010le"},
        {"preset": "p7", "tune": "hq", "rc": "constqp", "qp": "{qp}", "g": "1", "bf": "0", "spatial-aq": "0"},
    ),
}


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a matrix is cut into frames of one size: a function of its shape alone, so it is not stored."""

    numel: int
    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, rows: int, columns: int) -> "Tiling":
        """Frames of at most LARGEST to a side. What would have to be padded by more than MOST_PADDING loses its rows:
        it is folded, nearly into a square, since padding costs bits.
        """
        numel = rows * columns
        if _up(rows) * _up(columns) > (1 + MOST_PADDING) * numel:
            side = _up(math.isqrt(numel))
            widths = range(side, max(side // 2, MULTIPLE) - 1, -MULTIPLE)
            columns = min(widths, key=lambda width: width * _up(-(-numel // width)))
            rows = -(-numel // columns)
        return cls(numel, rows, columns, *(_up(-(-side // -(-side // LARGEST))) for side in (rows, columns)))

    @property
    def grid(self) -> tuple[int, int]:
        """How many frames lie under and beside each other."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    def cut(self, values: np.ndarray) -> np.ndarray:
        """(frames, height, width) of a matrix; what overhangs repeats its edge."""
        flat = np.pad(values.reshape(-1), (0, self.rows * self.columns - self.numel), "edge")
        down, across = self.grid
        overhang = ((0, down * self.height - self.rows), (0, across * self.width - self.columns))
        padded = np.pad(flat.reshape(self.rows, self.columns), overhang, "edge")
        tiles = padded.reshape(down, self.height, across, self.width).swapaxes(1, 2)
        return tiles.reshape(-1, self.height, self.width)

    def join(self, frames: np.ndarray) -> np.ndarray:
        """(numel,) the inverse of `cut`."""
        down, across = self.grid
        tiles = frames.reshape(down, across, self.height, self.width).swapaxes(1, 2)
        padded = tiles.reshape(down * self.height, across * self.width)
        return padded[: self.rows, : self.columns].reshape(-1)[: self.numel]


def encode(encoder: Encoder, values_RC: np.ndarray, unit: float, qp: int, depth: int) -> bytes:
    """The stream of fp32 values, of which `unit` is one sample.

    Raises:
        CodecError: PyAV is not installed, or has no such encoder here.
    """
    av = require("av")
    middle = 1 << (depth - 1)
    samples = np.clip(np.rint(values_RC / np.float32(unit)), -reach(depth), reach(depth)) + middle
    frames = Tiling.of(*values_RC.shape).cut(samples.astype(_sample(depth)))
    options = {name: value.format(qp=qp) for name, value in encoder.options.items()}
    try:
        context = av.CodecContext.create(encoder.name, "w")
        context.width, context.height = frames.shape[2], frames.shape[1]
        context.pix_fmt, context.options = encoder.formats[depth], options
        context.time_base, context.framerate, context.thread_count = Fraction(1, 25), Fraction(25), 1
        packets = []
        for number, frame in enumerate(frames):
            picture = _picture(av, frame, encoder.formats[depth])
            picture.pts = number
            packets += context.encode(picture)
        packets += context.encode(None)
    except (av.error.FFmpegError, ValueError) as error:  # ValueError: no encoder of this name
        remedy = "it needs an NVIDIA GPU with NVENC (A100 and H100 have none); " if encoder.name == "hevc_nvenc" else ""
        raise CodecError(f"{encoder.name} cannot encode here ({error}); {remedy}take another backend") from error
    return _without_comments(b"".join(map(bytes, packets)), encoder.stream)


def decode(stream: str, payload: bytes, shape_RC: tuple[int, int], unit: float, depth: int) -> np.ndarray:
    """(R C,) fp32 values of `encode`, by a decoder in software.

    Raises:
        CodecError: the payload is not the video of such a matrix; no larger picture is ever allocated.
    """
    av = require("av")
    tiling = Tiling.of(*shape_RC)
    size, number = (tiling.height, tiling.width), math.prod(tiling.grid)
    context = av.CodecContext.create(stream, "r")
    context.thread_count = 1
    context.options = {"max_pixels": str((size[0] + 128) * (size[1] + 128))}  # ffmpeg adds a margin to what it checks
    frames: list[np.ndarray] = []
    try:
        for packet in [*context.parse(payload), *context.parse(b""), None]:
            frames += (_luma(picture, depth) for picture in context.decode(packet))
            if len(frames) > number:
                break
    except av.error.FFmpegError as error:
        raise CodecError(f"a stream of {stream} is damaged ({error}); get the file again") from error
    if [frame.shape for frame in frames] != [size] * number:
        raise CodecError(f"a stream of {stream} is not of {number} pictures of {size}; get the file again")
    samples = tiling.join(np.stack(frames)).astype(np.float32)
    return (samples - np.float32(1 << (depth - 1))) * np.float32(unit)


def reach(depth: int) -> int:
    """How many samples there are on either side of the middle."""
    return (1 << (depth - 1)) - 1


def _picture(av: Any, frame: np.ndarray, layout: str) -> Any:
    """A frame as PyAV's picture; chroma, where the format has any, is neutral."""
    if layout.startswith("gray"):
        return av.VideoFrame.from_ndarray(frame, format=layout)
    picture = av.VideoFrame(frame.shape[1], frame.shape[0], layout)
    shift = 6 if layout == "p010le" else 0  # ten bits are the upper ones of sixteen
    for plane, samples in zip(
        picture.planes, (frame << shift, np.full_like(frame[::2], NEUTRAL << 8 if shift else NEUTRAL)), strict=True
    ):
        lines = np.zeros((plane.height, plane.line_size), np.uint8)
        lines[:, : samples.shape[1] * samples.itemsize] = samples.view(np.uint8)
        plane.update(lines.tobytes())
    return picture


def _luma(picture: Any, depth: int) -> np.ndarray:
    """(height, width) samples; x264's grey comes back with chroma planes."""
    plane, sample = picture.planes[0], _sample(depth)
    if plane.line_size < plane.width * sample.itemsize or picture.format.components[0].bits != depth:
        raise CodecError(f"a picture is not of {depth} bits; get the file again")
    lines = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return lines[:, : plane.width * sample.itemsize].copy().view(sample)


def _sample(depth: int) -> np.dtype[Any]:
    return np.dtype("u1" if depth == 8 else "<u2")


def _without_comments(payload: bytes, stream: str) -> bytes:
    """Without supplemental units: x264 writes its settings into one, half a kilobyte."""
    units = re.split(rb"(?=\x00\x00\x01)", payload)  # a zero before it, if any, ends the unit before
    types = [unit[3] & 31 if stream == "h264" else unit[3] >> 1 & 63 for unit in units[1:]]
    supplemental = {6} if stream == "h264" else {39, 40}
    return units[0] + b"".join(unit for unit, kind in zip(units[1:], types, strict=True) if kind not in supplemental)


def _up(size: int) -> int:
    return max(MULTIPLE, -(-size // MULTIPLE) * MULTIPLE)
