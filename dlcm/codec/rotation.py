"""Randomised Hadamard rotation of both sides of a matrix: outliers and directions are spread, values look Gaussian.

A side of 2^a m entries, m odd, is rotated as m interleaved sides of 2^a: any size works, an odd one is left alone.
Signs are fixed bits of SHAKE-256, the same for everybody, so nothing is stored. As in QuaRot (arXiv 2404.00456).
"""

import hashlib
import math

import numpy as np


def rotate(x_RC: np.ndarray) -> np.ndarray:
    """(R, C) fp32, rotated; energy is kept."""
    return _mix(_mix(x_RC * _signs(x_RC.shape[1])).T * _signs(x_RC.shape[0])).T


def unrotate(x_RC: np.ndarray) -> np.ndarray:
    """The inverse of `rotate`, to rounding."""
    return _mix((_mix(x_RC.T) * _signs(x_RC.shape[0])).T) * _signs(x_RC.shape[1])


def _signs(size: int) -> np.ndarray:
    """(size,) of -1 and 1."""
    stream = np.frombuffer(hashlib.shake_256(b"dlcm.codec").digest(-(-size // 8)), np.uint8)
    return 1 - 2 * np.unpackbits(stream)[:size].astype(np.float32)


def _mix(x_RC: np.ndarray) -> np.ndarray:
    """The Walsh-Hadamard transform of each row, orthonormal; its own inverse."""
    rows, columns = x_RC.shape
    length = columns & -columns  # the largest power of two that divides it
    x = np.ascontiguousarray(x_RC).reshape(rows, length, columns // length)
    span = 1
    while span < length:
        pairs = x.reshape(rows, length // (2 * span), 2, span, columns // length)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack((low + high, low - high), axis=2).reshape(x.shape)
        span *= 2
    return (x * np.float32(1 / math.sqrt(length))).reshape(rows, columns)
