"""Keys and values of a long past through a codec: old blocks are compressed, the first entries and the newest are not.

    entries of a row   | first: exact | block | block | .. | recent, and what fills no block yet: exact |

A block is compressed once, when it is complete and behind the recent entries, and attention reads what comes back of it
from then on. What comes back lies in the cache as before: bits are those of real blobs, memory is not saved and nothing
gets faster. That would take kernels that read blobs.

The first entries attract much of attention, and the newest as much again, so both stay exact (as in KVTC, arXiv
2511.01815).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dlcm.cache import DecodingCache
from dlcm.codec.baselines import Quantised
from dlcm.codec.blob import CodecError


class OldBlocks:
    """Compresses the old blocks of one cache, whose rows only grow: it is not told of `crop` or reordering.

    Args:
        code: a matrix (block, K N) fp32 of one layer's keys or values on the CPU, to what comes back and its bits.
        block: entries, of tokens or concepts.
        first, recent: entries that stay exact.

    Attributes:
        bits: of all that has been compressed, in all.
        values: how many these were.
        seconds: spent on it, in both directions.
    """

    def __init__(self, code: Callable[[Tensor], Quantised], block: int = 64, first: int = 4, recent: int = 64):
        if block < 1 or first < 0 or recent < 0:
            raise CodecError(f"block={block} must be at least 1, first={first} and recent={recent} at least 0")
        self.code, self.block, self.first, self.recent = code, block, first, recent
        self.bits, self.values, self.seconds = 0.0, 0, 0.0
        self._done: dict[tuple[str, int], int] = {}  # entries, by stage and row

    @torch.no_grad()
    def compress_(self, cache: DecodingCache) -> None:
        """Compresses the blocks that have become old since the last call."""
        for name, layers, entries_B in cache.keys_and_values():
            for row, entries in enumerate(entries_B.tolist()):
                start = self._done.get((name, row), self.first)
                while start + self.block + self.recent <= entries:
                    for x_BSKN in layers:
                        self._compress_block_(x_BSKN[row, start : start + self.block])
                    start += self.block
                self._done[name, row] = start

    def _compress_block_(self, x_sKN: Tensor) -> None:
        start = time.perf_counter()
        coded = self.code(x_sKN.flatten(1).float().cpu())
        self.seconds += time.perf_counter() - start
        x_sKN.copy_(coded.tensor.view(x_sKN.shape))
        self.bits += coded.bits * x_sKN.numel()
        self.values += x_sKN.numel()
