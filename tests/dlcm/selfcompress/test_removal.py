"""What removal leaves computes what the whole did, forward and backward; and its configuration alone rebuilds it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dlcm.causal_lm import PackedCausalLM
from dlcm.compilation import compile_blocks_
from dlcm.flops import forward_flops, parameter_counts, rounded_weights
from dlcm.selfcompress.packing import load_packed, save_packed
from dlcm.selfcompress.quantiser import kept_of, plain, quantised_linears
from dlcm.selfcompress.removal import remove_dead_
from tests.conftest import VOCABULARY, arrange, random_documents, tiny_baseline, tiny_baseline_config, tiny_dlcm

BUILDERS = [tiny_dlcm, tiny_baseline]
TILES = {"quantiser_rows": 4, "quantiser_columns": 4}
GROUPS = [{}, {"quantiser_rows": 2}, TILES, {"quantiser_rows": 2, "quantiser_columns": 8, "token_ffn": 32}]


def rounding(builder: Any, share: float, **overrides: Any) -> Any:
    """A model of 3-bit weights of which a share of the groups is dead, at random; in tiles, by rows and columns."""
    model = builder(quantiser="bits", **overrides)
    generator = torch.Generator().manual_seed(0)
    for layer in quantised_linears(model).values():
        layer.fit_(3)
        layer.exponent.data += 0.1  # no weight lies just where it begins to be clipped, and rounding decides
        dead = torch.rand(layer.depth.shape, generator=generator) < share / 2
        for line in layer.depth.shape:
            if line > 1:
                over = torch.rand(line, generator=generator) < share
                dead |= over[:, None] if line == layer.depth.shape[0] else over
        layer.depth.data.masked_fill_(dead, 0)
    return model


def removed(model: PackedCausalLM) -> tuple[Any, dict[str, Any]]:
    small = copy.deepcopy(model)
    return small, remove_dead_(small)


def loss_and_gradients(model: PackedCausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = arrange(random_documents([9, 17, 30], 0), "packed")
    loss = model(**batch.inputs, labels=batch.labels).loss
    loss.backward()
    return loss, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("groups", GROUPS, ids=["rows", "two rows", "tiles", "oblong"])
@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_the_loss_and_the_gradients_of_what_is_left_are_the_same(builder: Any, groups: dict[str, Any], share: float):
    model = rounding(builder, share, **groups)
    small, kept = removed(model)
    assert small.num_parameters() < model.num_parameters() and remove_dead_(small) == {}
    if share == 0.3 and "quantiser_columns" not in groups:  # of both kinds, some channels are left
        left = {kind: [x for name, x in small.config.channels_left.items() if kind in name] for kind in ("att", "ffn")}
        assert all(any(map(sum, numbers)) for numbers in left.values())
    expected, gradients = loss_and_gradients(model)
    loss, left = loss_and_gradients(small)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, kept_of(gradients[name], *kept.get(name, (None, None))))
    for name, gradient in gradients.items():  # of what nothing is left, it was no gradient of a weight
        assert name in left or gradient.count_nonzero() == 0 or name.endswith(("depth", "exponent"))


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("groups", [{}, TILES], ids=["rows", "tiles"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_configuration_rebuilds_what_is_left(builder: Any, groups: dict[str, Any], share: float, tmp_path: Path):
    model = rounding(builder, share, **groups)
    for layer in quantised_linears(model.decoder.layers[0].ffn).values():
        layer.fit_(3)
    small, _ = removed(model)
    expected = {name: x.shape for name, x in small.state_dict().items()}
    again = type(small)(small.config)
    assert {name: x.shape for name, x in again.state_dict().items()} == expected
    assert sum(parameter_counts(small.config).values()) == small.num_parameters()
    ids = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    small = small.float()
    with torch.no_grad():
        logits = small(ids).logits
        small.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids).logits, logits)
        save_packed(small, tmp_path, "fp32")
        unpacked, whole = load_packed(tmp_path, small.config), plain(small)
        assert whole.config.channels_left is None and whole.num_parameters() == builder().num_parameters()
        assert all(torch.equal(x, whole.state_dict()[name]) for name, x in unpacked.state_dict().items())
        torch.testing.assert_close(whole(ids).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("share", [0.7, 1.0])
def test_a_cache_works_as_before(builder: Any, share: float):
    small, _ = removed(rounding(builder, share))
    prompt = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = small(prompt).logits
    cache, logits = small.new_cache(), []
    for piece in prompt.split([6, 1, 1, 3], 1):
        logits.append(small(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-9, atol=1e-9)


@torch._dynamo.config.patch(recompile_limit=1)  # versions of a function; torch allows eight
def test_any_number_of_blocks_may_have_widths_of_their_own_when_compiled():
    model = rounding(tiny_baseline, 0.3, num_layers=4)
    model.decoder.layers[2].attention.o_proj.depth.data[:] = 0
    model.decoder.layers[3].ffn.down_proj.depth.data[:] = 0
    ids = torch.arange(20)[None]
    compile_blocks_(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, plain(model)(ids).logits, rtol=1e-9, atol=1e-9)
        remove_dead_(model)
        compile_blocks_(model, backend="eager")


def test_values_that_several_heads_read_go_when_none_does():
    model = rounding(tiny_baseline, 0, quantiser_columns=1)
    first, second = model.decoder.layers
    first.attention.v_proj.depth.data[2] = 0  # of head 0, which query heads 0 and 1 read
    first.attention.o_proj.depth.data[:, [9, 13]] = 0  # dimension 1 of query heads 2 and 3: all that read it of head 1
    first.attention.o_proj.depth.data[:, 8] = 0  # of query head 2 alone
    first.ffn.up_proj.depth.data[[0, 5]] = 0
    first.ffn.down_proj.depth.data[:, [5, 6]] = 0
    second.attention.o_proj.depth.data[:] = 0
    second.ffn.gate_proj.depth.data[:] = 0
    kept = remove_dead_(model)
    assert model.config.channels_left == {
        "decoder.layers.0.attention": [3, 3],
        "decoder.layers.0.ffn": [25],
        "decoder.layers.1.attention": [0, 0],
        "decoder.layers.1.ffn": [0],
    }
    assert kept["decoder.layers.0.attention.o_proj.weight"][1].tolist() == [0, 1, 3, 4, 5, 7, 8, 10, 11, 12, 14, 15]
    assert first.attention.v_proj.weight.shape == (6, 16) and first.attention.o_proj.depth.shape == (16, 12)
    assert not any(name.startswith("decoder.layers.1") for name, _ in model.named_parameters())
    # What is left may go later, wherever it now is.
    first.attention.v_proj.depth.data[3] = 0
    remove_dead_(model)
    assert model.config.channels_left["decoder.layers.0.attention"] == [3, 2]


def test_tiles_go_whole():
    model = rounding(tiny_baseline, 0, quantiser_rows=2, quantiser_columns=4)
    ffn = model.decoder.layers[0].ffn
    ffn.gate_proj.depth.data[[0, 3]] = 0  # units 0 and 1, 6 and 7
    remove_dead_(model)
    assert model.config.channels_left is None  # 0 to 3 are one tile of down_proj, 4 to 7 another
    ffn.up_proj.depth.data[1] = 0
    remove_dead_(model)
    assert model.config.channels_left == {"decoder.layers.0.ffn": [24]}
    assert ffn.gate_proj.depth.shape == (12, 4) and ffn.down_proj.depth.shape == (8, 6)


def test_cross_attention_keeps_a_group():
    model = rounding(tiny_dlcm, 0, quantiser_rows=2)
    model.cross_attention.v_proj.depth.data[:] = 0
    remove_dead_(model)
    assert sum(model.config.channels_left["cross_attention"]) == 2


@pytest.mark.parametrize("builder", BUILDERS)
def test_flops_fall_by_the_products_that_are_gone(builder: Any):
    model = rounding(builder, 0.6)
    small, _ = removed(model)
    # At a concept a token, weights are multiplied with as many rows everywhere.
    before, after = (forward_flops(x.config, 0, 1.0).total for x in (model, small))
    gone = sum(layer.weight.numel() for layer in quantised_linears(model).values())
    assert gone == sum(rounded_weights(small.config).values()) == sum(rounded_weights(model.config).values())
    gone -= sum(layer.weight.numel() for layer in quantised_linears(small).values())
    assert before - after == pytest.approx(2 * gone)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"decoder.layers.2.ffn": [4]}, "does not have"),
        ({"decoder.layers.0": [4]}, "does not have"),
        ({"decoder.layers.0.ffn": [29]}, "between 0 and"),
        ({"decoder.layers.0.ffn": [-4]}, "between 0 and"),
        ({"decoder.layers.0.attention": [4]}, "between 0 and"),
        ({"decoder.layers.0.ffn": [6]}, "no whole groups"),
        ({"decoder.layers.0.ffn": ["4"]}, "channels_left"),
        ({"decoder.layers.0.ffn": 4}, "channels_left"),
    ],
)
def test_nonsense_is_refused(left: Any, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_baseline_config(quantiser="bits", **TILES, channels_left=left)


def test_only_rounded_weights_are_removed():
    with pytest.raises(ValueError, match="needs quantiser='bits'"):
        tiny_baseline_config(channels_left={"decoder.layers.0.ffn": [4]})
    with pytest.raises(ValueError, match="some of its cross-attention"):
        tiny_dlcm(quantiser="bits", channels_left={"cross_attention": [0, 0]})
