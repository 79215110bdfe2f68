"""The newest concept beside cross-attention, and models that begin as their encoder and decoder alone."""

import pytest
import torch

from dlcm.layout import ConceptLayout, PackedLayout
from tests.conftest import random_documents, tiny_baseline, tiny_dlcm


def logits(model, ids_BL):
    with torch.no_grad():
        return model(ids_BL).logits


def test_what_is_injected_is_the_newest_concept_normed():
    model = tiny_dlcm(1, injection="every", decoder_layers=3, segmenter="fixed", target_ratio=3.0)
    injection, z_MC = model.injection, torch.randn(5, 24, dtype=torch.float64)
    normed_ME = injection(z_MC)
    torch.testing.assert_close(normed_ME.square().mean(1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-3)
    x_TE = torch.randn(5, 16, dtype=torch.float64)
    for layer in range(3):
        expected = x_TE + injection.gate[layer] * normed_ME
        torch.testing.assert_close(injection.enter(normed_ME, layer, x_TE), expected)


@pytest.mark.parametrize(("injection", "layers"), [("first", 1), ("every", 3)])
def test_before_which_layers(injection: str, layers: int):
    """Each of its gates moves the logits, and so does the newest slot alone."""
    model = tiny_dlcm(1, injection=injection, decoder_layers=3)
    (document,) = random_documents([12], 1)
    before = logits(model, document[None])
    assert len(model.injection.gate) == layers
    for layer in range(layers):
        with torch.no_grad():
            model.injection.gate[layer].neg_()
            assert (logits(model, document[None]) - before).abs().max() > 1e-3
            model.injection.gate[layer].neg_()


@pytest.mark.parametrize("injection", ["first", "closing"])
def test_tokens_get_the_newest_slot_that_they_see(injection: str, monkeypatch: pytest.MonkeyPatch):
    model = tiny_dlcm(1, injection=injection, segmenter="fixed", target_ratio=3.0, smoothing="none")
    found = []

    def catch(h_TE, tokens, attend, newest_TE, past=None):
        found.append(newest_TE)
        return h_TE

    monkeypatch.setattr(model, "through_decoder", catch)
    tokens = PackedLayout.from_cu_seqlens(torch.tensor([0, 7, 12]), 12)
    boundary_T = tokens.position_T % 3 == 0
    layout = ConceptLayout.from_boundaries(tokens, boundary_T, "closed")
    h_TE = torch.randn(12, 16, dtype=torch.float64)
    with torch.no_grad():
        model.through_concepts_of(layout, h_TE, h_TE)
        z_MC = model.smooth(model.backbone(model.pooling(h_TE, layout), layout.concepts), layout.concepts)
        concepts = model.injection(z_MC)
    # none yet for three tokens of each document, then c0, c1; the second document's concepts are c3 and c4
    none = torch.zeros(16, dtype=torch.float64)
    later = 1 if injection == "first" else 0  # whether tokens get it that are not the first to see it
    expected = [none] * 3 + [concepts[0]] + [later * concepts[0]] * 2 + [concepts[1]]
    expected += [none] * 3 + [concepts[3], later * concepts[3]]
    torch.testing.assert_close(found[0], torch.stack(expected))


def test_concepts_of_one_token_added_where_they_close_make_a_transformer_of_all_layers():
    """No interface is left: each token passes through the encoder, a stack of layers beside it, and the decoder."""
    model = tiny_dlcm(
        1, injection="closing", cross_attention=False, segmenter="fixed", target_ratio=1.0, visibility="inclusive",
        pooling="last",
    )  # fmt: skip
    (document,) = random_documents([12], 1)
    tokens = PackedLayout.from_cu_seqlens(torch.tensor([0, 12]), 12)
    with torch.no_grad():
        h_TE = model.encoder(model.embed_tokens(document), tokens)
        z_TC = model.smooth(model.backbone(model.pooling.project(h_TE), tokens), tokens)
        h_TE = model.decoder(h_TE + model.injection.up_proj(z_TC), tokens)
        expected = model.lm_head(model.decoder_norm(h_TE)) / model.config.token_width_multiplier
    torch.testing.assert_close(logits(model, document[None])[0], expected)


def at_the_start(**options):
    """A model as training begins it."""
    torch.manual_seed(0)
    model = tiny_dlcm(**options)
    model.initialize_weights()
    return model


@pytest.mark.parametrize("injection", ["first", "every"])
def test_an_injection_begins_as_none(injection: str):
    (document,) = random_documents([12], 1)
    model, plain = at_the_start(injection=injection), at_the_start()
    weights = model.state_dict()
    plain.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("injection.")})
    torch.testing.assert_close(logits(model, document[None]), logits(plain, document[None]))
    model(document[None], labels=document[None]).loss.backward()
    assert model.injection.gate.grad.abs().amax(1).min() > 0  # and can leave zero


def test_a_clean_start_begins_as_encoder_and_decoder_alone():
    (document,) = random_documents([12], 1)
    model, llama = at_the_start(clean_start=True, injection="every"), tiny_baseline(num_layers=2)
    weights = model.state_dict()
    names = {
        name: name.replace("decoder.layers.0", "encoder.layers.0").replace("decoder.layers.1", "decoder.layers.0")
        for name in llama.state_dict()
    }
    llama.load_state_dict({name: weights[ours] for name, ours in names.items()})
    torch.testing.assert_close(logits(model, document[None]), logits(llama, document[None]))
    model(document[None], labels=document[None]).loss.backward()
    for path in (model.skip_proj.weight, model.cross_attention.gate, model.injection.gate):
        assert not path.any() and path.grad.abs().max() > 0
    assert not torch.allclose(logits(at_the_start(), document[None]), logits(llama, document[None]))
