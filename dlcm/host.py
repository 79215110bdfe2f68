"""What the host learns from the device, and when it waits for it."""

import torch
from torch import Tensor


class OnHost:
    """Numbers on their way to the host: the copy waits for the device, and nobody for the copy but who reads them.

    In training, and in a step of decoding, to read is the one way to wait for the device. Who first hands it more work
    waits least.
    """

    def __init__(self, numbers: Tensor):
        """Starts the copy of a tensor of one dimension."""
        self._numbers = numbers.detach().to("cpu", non_blocking=True)  # from a GPU, into pinned memory
        self._read: list | None = None
        self._copied = torch.cuda.Event() if numbers.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list:
        """The numbers; waits until they are there."""
        if self._read is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._read = self._numbers.tolist()
        return self._read
