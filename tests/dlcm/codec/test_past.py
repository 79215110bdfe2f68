"""Which entries of a cache are compressed, what attention reads of them, and what they cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dlcm.codec import CodecError, OldBlocks, Quantised, compress, decompress
from eval.calibration import Model
from tests.conftest import VOCABULARY, tiny_baseline, tiny_dlcm

IDS_BL = torch.randint(VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))


def halved(x: Tensor) -> Quantised:
    return Quantised(x / 2, 3.0)


def filled(model: Model, columns: int = 60) -> object:
    cache = model.new_cache()
    model(input_ids=IDS_BL[:, :columns], past_key_values=cache)
    return cache


@pytest.mark.parametrize("make", (tiny_dlcm, tiny_baseline))
def test_complete_old_blocks_change_once_and_nothing_else(make: Callable[[], Model]) -> None:
    cache, exact = filled(make()), filled(make())
    blocks = OldBlocks(halved, block=5, first=2, recent=6)
    blocks.compress_(cache)
    blocks.compress_(cache)  # nothing is older than it was
    compressed = 0
    for (_, layers, entries_B), (_, same, _) in zip(cache.keys_and_values(), exact.keys_and_values(), strict=True):
        for row, entries in enumerate(entries_B.tolist()):
            old = max(0, (entries - 2 - 6) // 5) * 5
            for x_SKN, y_SKN in zip((x[row, :entries] for x in layers), (y[row, :entries] for y in same), strict=True):
                torch.testing.assert_close(x_SKN[2 : 2 + old], y_SKN[2 : 2 + old] / 2)
                assert torch.equal(x_SKN[:2], y_SKN[:2]) and torch.equal(x_SKN[2 + old :], y_SKN[2 + old :])
            compressed += old * sum(x[row, 0].numel() for x in layers)
    assert blocks.values == compressed > 0 and blocks.bits == 3 * compressed


def test_what_is_read_in_pieces_is_compressed_as_it_grows_old() -> None:
    model, sizes = tiny_baseline(), (17, 1, 30, 12)
    cache, blocks = model.new_cache(), OldBlocks(halved, block=4, first=1, recent=8)
    for ids_Bl in IDS_BL.split(sizes, 1):
        model(input_ids=ids_Bl, past_key_values=cache)
        blocks.compress_(cache)
    keys = next(layers for name, layers, _ in cache.keys_and_values() if name.endswith("keys"))[0]
    exact = next(layers for name, layers, _ in filled(model).keys_and_values() if name.endswith("keys"))[0]
    old = (60 - 1 - 8) // 4 * 4  # keys of the first layer do not depend on the past
    torch.testing.assert_close(keys[:, 1 : 1 + old], exact[:, 1 : 1 + old] / 2)
    torch.testing.assert_close(keys[:, 1 + old : 60], exact[:, 1 + old : 60])


def test_with_many_bits_generation_goes_on_as_it_was_and_with_few_it_does_not() -> None:
    model = tiny_dlcm()
    expected = model(input_ids=IDS_BL[:, -1:], past_key_values=filled(model, 59)).logits
    differences = {}
    for bits in (24.0, 12.0):

        def code(x: Tensor, bits: float = bits) -> Quantised:
            blob = compress(x, bits=bits, backend="entropy")
            return Quantised(decompress(blob), blob.bits)

        cache, blocks = filled(model, 59), OldBlocks(code, block=20, first=1, recent=0)
        blocks.compress_(cache)
        assert 0.5 * bits < blocks.bits / blocks.values <= bits
        logits = model(input_ids=IDS_BL[:, -1:], past_key_values=cache).logits
        differences[bits] = (logits - expected).abs().max().item()
    assert 0 < differences[24.0] < 0.2 * differences[12.0]


def test_impossible_blocks_are_refused() -> None:
    with pytest.raises(CodecError, match="block=0"):
        OldBlocks(halved, block=0)
