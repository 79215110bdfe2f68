"""The smaller model computes what the pruned one did: in a forward pass, with a cache, for whatever is zero."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dlcm.causal_lm import PackedCausalLM
from dlcm.selfcompress.compact import block_weights, compact_
from dlcm.selfcompress.quantiser import plain, quantised_linears
from tests.conftest import VOCABULARY, arrange, random_documents, tiny_baseline, tiny_dlcm

BUILDERS = [tiny_dlcm, tiny_baseline]


def pruned(builder: Any, share: float, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides: Any) -> Any:
    """A plain model of 3-bit weights of which a share of the groups is dead, at random."""
    model = builder(seed, quantiser="bits", **overrides)
    generator = torch.Generator().manual_seed(seed)
    for layer in quantised_linears(model).values():
        layer.fit_(3)
        dead = torch.rand(layer.depth.shape, generator=generator) < share
        layer.depth.data.masked_fill_(dead, 0)
    return plain(model).to(dtype)


def compacted(model: PackedCausalLM) -> PackedCausalLM:
    small = copy.deepcopy(model)
    compact_(small)
    return small


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("groups", [{}, {"quantiser_rows": 4, "quantiser_columns": 4}], ids=["channels", "tiles"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_logits_are_the_same(builder: Any, groups: dict[str, int], share: float):
    model = pruned(builder, share, qk_norm=share == 0.7, **groups)
    small = compacted(model)
    batch = arrange(random_documents([9, 17, 40], 0), "packed")
    torch.testing.assert_close(small(**batch.inputs).logits, model(**batch.inputs).logits, rtol=1e-9, atol=1e-9)
    left = block_weights(small) / block_weights(model)
    if share in (0, 1):
        assert left == 1 - share
    elif groups == {}:
        assert left < 1 - share  # the neighbours of dead channels go, too


@pytest.mark.parametrize("builder", BUILDERS)
def test_in_fp32_over_four_thousand_tokens_the_same_words_are_likeliest(builder: Any):
    model = pruned(builder, 0.6, dtype=torch.float32)
    small = compacted(model)
    rows = torch.randint(VOCABULARY, (72, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = model(rows).logits, small(rows).logits
    assert expected[..., 0].numel() >= 4096
    assert (actual - expected).abs().max() < 1e-4
    top = expected.topk(2, -1).values
    near = (top[..., 0] - top[..., 1]) < 2e-4  # ties of fp32, where either may come first
    assert bool(((actual.argmax(-1) == expected.argmax(-1)) | near).all())
    assert near.float().mean() < 1e-3


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_cache_works_as_before(builder: Any):
    model = pruned(builder, 0.6)
    small = compacted(model)
    prompt = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
    cache, logits = small.new_cache(), []
    for piece in prompt.split([6, 1, 1, 3], 1):
        logits.append(small(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(prompt).logits, rtol=1e-9, atol=1e-9)


def test_hidden_units_and_values_leave_their_neighbours_inputs():
    model = tiny_baseline(num_layers=1)
    ffn, attention = model.decoder.layers[0].ffn, model.decoder.layers[0].attention
    with torch.no_grad():
        ffn.gate_proj.weight[3] = ffn.up_proj.weight[5] = 0
        ffn.down_proj.weight[:, 7] = 0
        attention.v_proj.weight[2] = 0  # of head 0, which query heads 0 and 1 read
        attention.o_proj.weight[:, [9, 13]] = 0  # dimension 1 of query heads 2 and 3: all that read it of head 1
        attention.o_proj.weight[:, 8] = 0  # of query head 2 alone
    compact_(model)
    ffn, attention = model.decoder.layers[0].ffn, model.decoder.layers[0].attention
    assert [len(layer.weight) for layer in (ffn.gate_proj, ffn.up_proj)] == [25, 25]
    assert ffn.down_proj.weight.shape == (16, 25) and ffn.down_proj.columns is None and ffn.gate_proj.rows is None
    assert attention.v_proj.rows.tolist() == [0, 1, 3, 4, 6, 7]
    assert attention.o_proj.columns.tolist() == [0, 1, 3, 4, 5, 7, 10, 11, 12, 14, 15]


def test_dead_sublayers_are_not_run(monkeypatch: pytest.MonkeyPatch):
    model = tiny_baseline()
    first, second = model.decoder.layers
    for weight in (first.attention.o_proj.weight, second.ffn.gate_proj.weight):
        nn.init.zeros_(weight)
    rows = torch.stack(random_documents([9, 9], 0))
    expected = model(rows).logits
    compact_(model)
    first, second = model.decoder.layers
    assert (first.attends, first.feeds, second.attends, second.feeds) == (False, True, True, False)
    for sublayer in (first.attention, second.ffn):
        monkeypatch.setattr(sublayer, "forward", None)
    monkeypatch.setattr(first.attention, "heads", None)
    torch.testing.assert_close(model(rows).logits, expected, rtol=1e-9, atol=1e-9)


def test_rounding_layers_are_refused():
    with pytest.raises(ValueError, match="plain"):
        compact_(tiny_baseline(quantiser="bits"))
