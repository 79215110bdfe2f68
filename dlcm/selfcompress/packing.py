"""A model of few bits as a file: each group of weights in as many bits as its whole numbers need.

    model.packed      safetensors, four tensors of all groups, matrices by name, groups row by row:
      widths          uint8, bits of a code in the group; 0: its weights are zero, and it has nothing of what follows
      minimums        int8, what a code of 0 stands for
      scales          fp32
      codes           uint8, the codes' bits one behind another, lowest first; a matrix begins with a byte of its own
      and by their names, in half precision or as they were, all that is not rounded
    config.json       of the model, which says what the matrices are and how they are grouped

Everything counts: embeddings, norms, head and the file's own header. A weight is minimum plus code, times scale, the
very product of the forward pass: what is unpacked equals what was trained to the last bit.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlcm.baseline import LlamaBaselineForCausalLM
from dlcm.config import DLCMConfig, LlamaBaselineConfig, changed
from dlcm.flops import parameter_counts, rounded_weights
from dlcm.model import DLCMForCausalLM
from dlcm.selfcompress.quantiser import (
    MAX_BITS,
    QUANTISER_PARAMETERS,
    Quantised,
    QuantisedLinear,
    group_shape,
    plain_of,
    quantised_linears,
)

PACKED = "model.packed"
ARRAYS = ("widths", "minimums", "scales", "codes")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of a group that is not dead: minimum and scale. Of every group: its width.
LIVE_BITS, GROUP_BITS = 8 + 32, 8
# All groups could be dead, and a file be small: what a weight of no bits may unpack to is bounded all the same.
MOST_WEIGHTS_PER_BYTE = 4096

Model = DLCMForCausalLM | LlamaBaselineForCausalLM


class PackedError(ValueError):
    """A packed file that cannot be read; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix: G groups, of which L are not dead.

    Attributes:
        widths_G: bits of a code.
        minimums_L, scales_L: of the live groups.
        codes: bytes.
    """

    widths_G: np.ndarray
    minimums_L: np.ndarray
    scales_L: np.ndarray
    codes: np.ndarray


def pack_matrix(codes: Tensor, scale: Tensor) -> PackedMatrix:
    """Packs whole numbers (O / r, r, I / c, c) with scales (O / r, I / c), as a layer's `codes` gives them."""
    groups = codes.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).round().to(torch.int16).cpu().numpy()  # (G, r c)
    lowest, highest = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    widths = np.ceil(np.log2(highest - lowest + 1.0)).astype(np.uint8)
    live = widths > 0
    offsets = (groups - lowest[:, None]).astype(np.uint8)
    bits = np.zeros(int(widths.sum(dtype=np.int64)) * groups.shape[1], dtype=np.uint8)
    for where, place in _by_width(widths, groups.shape[1]):
        width = int(widths[where[0]])
        bits[place] = (offsets[where][..., None] >> np.arange(width, dtype=np.uint8) & 1).reshape(len(where), -1)
    scales = scale.flatten().float().cpu().numpy()
    return PackedMatrix(widths, lowest[live].astype(np.int8), scales[live], np.packbits(bits, bitorder="little"))


def unpack_matrix(packed: PackedMatrix, shape: tuple[int, int], rows: int, columns: int) -> Tensor:
    """The weights (O, I), fp32, of groups of these rows and columns."""
    size, widths = rows * columns, packed.widths_G
    bits = np.unpackbits(packed.codes, bitorder="little")
    live = np.cumsum(widths > 0) - 1  # where a live group's minimum and scale are
    values = np.zeros((len(widths), size), dtype=np.float32)
    for where, place in _by_width(widths, size):
        width = int(widths[where[0]])
        weights = (1 << np.arange(width)).astype(np.int16)
        offsets = bits[place].reshape(len(where), size, width).astype(np.int16) @ weights
        whole = offsets + packed.minimums_L[live[where], None].astype(np.int16)
        values[where] = packed.scales_L[live[where], None] * whole.astype(np.float32)
    tiles = torch.from_numpy(values).view(shape[0] // rows, shape[1] // columns, rows, columns)
    return tiles.transpose(1, 2).reshape(shape)


def _by_width(widths: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Groups (n,) of one width, width after width, and where their bits are, (n, size * width)."""
    ends = np.cumsum(widths.astype(np.int64) * size)
    for width in sorted(set(widths.tolist()) - {0}):
        (where,) = (widths == width).nonzero()
        yield where, (ends[where] - size * width)[:, None] + np.arange(size * width)


def save_packed(model: Model, directory: Path, rest: str) -> Path:
    """Writes `model.packed` and `config.json`; returns the former.

    Args:
        model: whose weights are rounded in the forward pass.
        directory: exists.
        rest: of `DTYPES`, for what is not rounded.

    Raises:
        ValueError: no weight is rounded.
        OSError, SafetensorError: the disk refused.
    """
    layers = quantised_linears(model)
    if not layers:
        raise ValueError("no weight of this model is rounded: train it with compression.method")
    matrices = [pack_matrix(*layers[name].codes()) for name in sorted(layers)]
    arrays = (np.concatenate([getattr(x, key) for x in matrices]) for key in PackedMatrix.__dataclass_fields__)
    tensors = dict(zip(ARRAYS, map(torch.from_numpy, arrays), strict=True))
    tensors |= {name: x.to("cpu", DTYPES[rest]) for name, x in _not_rounded(model).items()}
    save_file({name: x.contiguous() for name, x in tensors.items()}, directory / PACKED, {"format": "pt"})
    model.config.save_pretrained(directory)
    return directory / PACKED


@dataclass(frozen=True, slots=True)
class PackedModel:
    """What a packed file holds.

    Attributes:
        model: on the meta device, its weights rounded in the forward pass.
        matrices: of its layers that round, by name.
        rest: all other tensors, by name.
    """

    model: Model
    matrices: dict[str, PackedMatrix]
    rest: dict[str, Tensor]


def read_packed(directory: Path, config: DLCMConfig | LlamaBaselineConfig) -> PackedModel:
    """Reads a packed file, whose every length is checked.

    Args:
        directory: holds `model.packed`.
        config: what its config.json says.

    Raises:
        PackedError: the file is damaged, or of another model; of what config.json says, nothing is allocated that the
            file does not bear out.
    """
    path = directory / PACKED
    if path.is_symlink() or not path.is_file():
        raise PackedError(f"{path}: missing, or a link; pack the checkpoint again")
    try:
        with safe_open(path, "pt") as file:
            _check_size(path, config, {name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PackedError(f"{path}: no packed file ({error}); pack the checkpoint again") from error
    with torch.device("meta"):
        model = DLCMForCausalLM(config) if isinstance(config, DLCMConfig) else LlamaBaselineForCausalLM(config)
    matrices, rest = _matrices(path, model, tensors), {}
    for name, expected in _not_rounded(model).items():
        found = tensors.get(name)
        if found is None or found.shape != expected.shape or found.dtype not in DTYPES.values():
            raise PackedError(f"{path}: {name} is missing, or of another shape; pack the checkpoint again")
        rest[name] = found
    return PackedModel(model, matrices, rest)


def load_packed(directory: Path, config: DLCMConfig | LlamaBaselineConfig) -> Model:
    """The model of a packed file, with plain weights in the widths it began with, in fp32 and evaluation mode.

    Args, Raises: see `read_packed`.
    """
    packed = read_packed(directory, config)
    state = {name: x.float() for name, x in packed.rest.items()}
    for name, layer in quantised_linears(packed.model).items():
        rows, columns = layer.weight.shape
        state[f"{name}.weight"] = unpack_matrix(packed.matrices[name], (rows, columns), *group_of(layer))
    return plain_of(packed.model, state).eval()


def _check_size(path: Path, config: DLCMConfig | LlamaBaselineConfig, shapes: dict[str, list[int]]) -> None:
    """Compares the numbers of a header with the config's, before anything of either size is built."""
    lacking = [name for name in ARRAYS if len(shapes.get(name, ())) != 1]
    if lacking or config.quantiser == "none":
        raise PackedError(f"{path}: has no {lacking[0] if lacking else 'rounded weights'}; pack the checkpoint again")
    # What was removed is zero in the model that is unpacked.
    numbers = sum(parameter_counts(changed(config, {"channels_left": None})).values())
    rest = sum(math.prod(shape) for name, shape in shapes.items() if name not in ARRAYS)
    if not 0 < numbers - rest < MOST_WEIGHTS_PER_BYTE * path.stat().st_size:
        raise PackedError(f"{path}: config.json is of {numbers:,} numbers, which this file does not hold")


def _matrices(path: Path, model: Model, tensors: dict[str, Tensor]) -> dict[str, PackedMatrix]:
    """The matrices by name, cut out of the four arrays."""
    arrays = [tensors[name].numpy() for name in ARRAYS]
    kinds = [x.dtype.name for x in arrays]
    if kinds != ["uint8", "int8", "float32", "uint8"]:
        raise PackedError(f"{path}: {', '.join(ARRAYS)} are {', '.join(kinds)}; pack the checkpoint again")
    widths, minimums, scales, codes = arrays
    layers, matrices = quantised_linears(model), {}
    for name in sorted(layers):
        rows, columns = group_of(layers[name])
        groups = layers[name].weight.numel() // (rows * columns)
        own = widths[:groups]
        live, nbytes = int((own > 0).sum()), -(-int(own.sum(dtype=np.int64)) * rows * columns // 8)
        if len(own) < groups or own.max() > MAX_BITS or live > min(len(minimums), len(scales)) or nbytes > len(codes):
            raise PackedError(f"{path}: ends within {name}, or is damaged there; pack the checkpoint again")
        matrices[name] = PackedMatrix(own, minimums[:live], scales[:live], codes[:nbytes])
        widths, minimums, scales, codes = widths[groups:], minimums[live:], scales[live:], codes[nbytes:]
    if any(map(len, (widths, minimums, scales, codes))):
        raise PackedError(f"{path}: has more groups than config.json's model; pack the checkpoint again")
    return matrices


def group_of(layer: Quantised) -> tuple[int, int]:
    """Rows and columns of the groups in which a layer's weights are packed."""
    if isinstance(layer, QuantisedLinear):
        return group_shape(layer.weight, layer.depth)
    return layer.out_features, layer.in_features  # ternary: one scale


def _not_rounded(model: Model) -> dict[str, Tensor]:
    """What is stored as numbers, by name."""
    layers = quantised_linears(model)
    of_layers = {f"{name}.{kind}" for name in layers for kind in ("weight", *QUANTISER_PARAMETERS)}
    return {name: x for name, x in model.state_dict().items() if name not in of_layers}


# Sizes


@dataclass(frozen=True, slots=True)
class Size:
    """Bits of a packed model.

    Attributes:
        weights: how many were rounded at the start, before removal.
        code_bits: of their codes.
        header_bits: widths, minimums and scales.
        rest_bits: what is not rounded.
    """

    weights: int
    code_bits: int
    header_bits: int
    rest_bits: int

    @property
    def total(self) -> int:
        return self.code_bits + self.header_bits + self.rest_bits


@torch.no_grad()
def predicted_size(model: Model, rest: str) -> Size:
    """What the bit depths promise, without a look at the weights; ternary ones take two bits."""
    layers = quantised_linears(model).values()
    groups = live = code_bits = 0
    for layer in layers:
        rows, columns = group_of(layer)
        depth = layer.depth.clamp(0, MAX_BITS).ceil() if isinstance(layer, QuantisedLinear) else torch.tensor([2.0])
        groups, live = groups + depth.numel(), live + int((depth > 0).sum())
        code_bits += int(depth.double().sum()) * rows * columns
    numbers = sum(x.numel() for x in _not_rounded(model).values())
    weights = sum(rounded_weights(model.config).values())
    return Size(weights, code_bits, GROUP_BITS * groups + LIVE_BITS * live, 8 * DTYPES[rest].itemsize * numbers)


def file_size(path: Path) -> dict[str, int]:
    """Bytes of a packed file: of its four arrays, of the rest, and in all; by its header alone."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    sizes = {name: x["data_offsets"][1] - x["data_offsets"][0] for name, x in header.items() if name != "__metadata__"}
    rest = sum(size for name, size in sizes.items() if name not in ARRAYS)
    return {name: sizes[name] for name in ARRAYS} | {"rest": rest, "file": path.stat().st_size}
