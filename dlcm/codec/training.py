"""Training through a codec: activations across a pipeline boundary, and gradients between the ranks of a DDP.

    cut = PipelineCut(forward=partial(compress, bits=3.5))          h_TE = cut(h_TE)
    ddp.register_comm_hook(GradientCodec(partial(compress_at_most, bits=2.6)), average_compressed)

What crosses is blobs: every byte is counted. The codecs of this package run on the CPU, so links have to be slow before
this gains time; it shows what training bears.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dlcm.codec.blob import Blob, BudgetUnused
from dlcm.codec.state import is_coded
from dlcm.codec.tensor import compress, decompress, store

Code = Callable[[Tensor], Blob]
FAR = 64.0  # deviations within which a gradient is quantised, not kept: their tails are heavy, and many rows are 0


def compress_at_most(tensor: Tensor, bits: float, **options: Any) -> Blob:
    """`compress`, but where the backend has no use for so many bits, as for a gradient of few rows that are not 0, as
    finely as it can.
    """
    try:
        return compress(tensor, bits=bits, **options)
    except BudgetUnused as unused:
        return unused.finest


def gradient_code(bits: float) -> Code:
    """The range coder at so many bits a value: of what a picture has, gradients have nothing."""
    return partial(compress_at_most, bits=bits, backend="entropy", clip_sigma=FAR)


class PipelineCut:
    """A place between two stages of a pipeline, where activations and their gradients are sent as blobs.

    Args:
        forward: makes a blob of activations; None sends them exactly.
        backward: the same of their gradients, which take compression badly (LLM.265 needed 10 bits): exact by default.

    Attributes:
        forward_bits, backward_bits: bits of all blobs that have crossed.
        values: that have crossed, forward.
    """

    def __init__(self, forward: Code | None, backward: Code | None = None):
        self._forward, self._backward = forward or store, backward or store
        self.forward_bits = self.backward_bits = self.values = 0

    def __call__(self, x: Tensor) -> Tensor:
        """What the next stage gets of `x`; differentiable, the gradient is what the stage before gets of its own."""
        crossed: Tensor = _Crossing.apply(x, self)
        return crossed

    def send_forward(self, x: Tensor) -> Tensor:
        blob = self._forward(x)
        self.forward_bits, self.values = self.forward_bits + 8 * blob.nbytes, self.values + x.numel()
        return decompress(blob, x.dtype, x.device)

    def send_backward(self, gradient: Tensor) -> Tensor:
        blob = self._backward(gradient)
        self.backward_bits += 8 * blob.nbytes
        return decompress(blob, gradient.dtype, gradient.device)


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: PipelineCut) -> Tensor:
        ctx.cut = cut
        return cut.send_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.cut.send_backward(gradients[0]), None


class GradientCodec:
    """How one rank compresses its gradients: the state of `average_compressed`.

    Args:
        code: makes a blob of a matrix's gradient. What is small or a vector, or has a value that is not finite, which
            all ranks must come to see, is sent exactly.
        feedback: whether what a blob lost is added to the next gradient of the same parameter, so that nothing is lost
            for good (Seide et al., 2014).
        group: of the ranks; None is all.

    Attributes:
        bits: of all blobs that this rank has sent.
        values: that they stand for.
    """

    def __init__(self, code: Code, feedback: bool = True, group: dist.ProcessGroup | None = None):
        self.code, self.feedback, self.group = code, feedback, group
        self.bits = self.values = 0
        self._lost: dict[Tensor, Tensor] = {}  # by parameter: buckets are made anew after the first step

    def blob(self, parameter: Tensor, gradient: Tensor) -> Blob:
        """What is sent of a parameter's gradient."""
        if not is_coded("", gradient) or not torch.isfinite(gradient).all():
            blob = store(gradient)
        else:
            wanted = gradient + self._lost[parameter] if parameter in self._lost else gradient
            blob = self.code(wanted)
            if self.feedback:
                self._lost[parameter] = wanted - decompress(blob, wanted.dtype, wanted.device)
        self.bits, self.values = self.bits + 8 * blob.nbytes, self.values + gradient.numel()
        return blob


def average_compressed(codec: GradientCodec, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel: each rank sends blobs, and all average what comes back of them.

    Raises:
        CodecError: see `compress`.
    """
    parameters, gradients = bucket.parameters(), bucket.gradients()
    own = [codec.blob(*pair) for pair in zip(parameters, gradients, strict=True)]
    everybody = _gathered([blob.to_bytes() for blob in own], bucket.buffer().device, codec.group)
    for index, gradient in enumerate(gradients):  # views of the buffer
        received = [decompress(Blob.from_bytes(sent[index]), gradient.dtype, gradient.device) for sent in everybody]
        gradient.copy_(torch.stack(received).mean(0))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _gathered(parts: list[bytes], device: torch.device, group: dist.ProcessGroup | None) -> list[list[bytes]]:
    """The parts of every rank, as many of each."""
    ranks = dist.get_world_size(group)
    sizes = torch.tensor([len(part) for part in parts], device=device)
    sizes_of = [torch.empty_like(sizes) for _ in range(ranks)]
    dist.all_gather(sizes_of, sizes, group)
    longest = int(torch.stack(sizes_of).sum(1).max())
    sent = torch.zeros(longest, dtype=torch.uint8, device=device)
    sent[: int(sizes.sum())] = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).to(device)
    received = [torch.empty_like(sent) for _ in range(ranks)]
    dist.all_gather(received, sent, group)
    return [
        [part.cpu().numpy().tobytes() for part in data[: int(its.sum())].split(its.tolist())]
        for data, its in zip(received, sizes_of, strict=True)
    ]
