"""The two models as `transformers` citizens: saving, outputs, losses, generation, numerics, learning."""

import functools
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.linear_cross_entropy import linear_cross_entropy
from dlcm.mup import parameter_groups
from tests.conftest import (
    VOCABULARY,
    arrange,
    random_documents,
    tiny_baseline,
    tiny_baseline_config,
    tiny_config,
    tiny_dlcm,
)

BUILDERS = [tiny_dlcm, tiny_baseline]


# Saving and loading


@pytest.mark.parametrize("build", BUILDERS)
def test_a_saved_model_loads_as_it_was(build, tmp_path):
    model = build(1).float()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids_BL = torch.stack(random_documents([9, 9], seed=0))
    assert torch.equal(model(ids_BL).logits, loaded(ids_BL).logits)


@pytest.mark.parametrize(
    ("build", "config_class", "model_class"),
    [
        (tiny_dlcm, DLCMConfig, DLCMForCausalLM),
        (tiny_baseline, LlamaBaselineConfig, LlamaBaselineForCausalLM),
    ],
)
def test_auto_classes(build, config_class, model_class, tmp_path):
    model = build(1)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is config_class
    assert type(AutoModelForCausalLM.from_config(config)) is model_class
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(loaded.dtype))


@pytest.mark.parametrize("build", BUILDERS)
def test_a_model_loads_in_half_precision(build, tmp_path):
    model = build(1).float()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], weight.bfloat16()) for name, weight in model.state_dict().items())
    assert bool(loaded(torch.arange(6)[None]).logits.isfinite().all())


@pytest.mark.parametrize("build", BUILDERS)
def test_a_missing_tensor_is_drawn_and_the_others_are_kept(build, tmp_path):
    """Loading draws only what the file lacks, by its role."""
    model = build(1).float()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decoder_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert torch.equal(loaded.pop("decoder_norm.weight"), torch.ones(16))
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)


@pytest.mark.parametrize("build", BUILDERS)
def test_every_parameter_is_initialised(build):
    """Two models of one seed are equal, and nothing is left as it lay in memory."""
    config = build().config
    models = []
    for fill in (0.0, 1.0):
        torch.manual_seed(0)
        model = type(build())(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(fill)
        torch.manual_seed(0)
        model.initialize_weights()
        models.append(model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


# Outputs


def test_output_of_the_dlcm():
    documents = random_documents([5, 9, 3], seed=2)
    batch = arrange(documents, "right_padded")
    output = tiny_dlcm(2)(**batch.inputs, labels=batch.labels)
    assert output.logits.shape == (3, 9, VOCABULARY)
    assert output.boundary_probs.shape == output.boundaries.shape == (3, 9)
    assert output.boundaries.dtype == torch.bool
    assert all(loss.shape == () for loss in (output.loss, output.ce_loss, output.aux_loss))
    for x_BL in (output.logits, output.boundary_probs, output.boundaries):
        assert not x_BL[~batch.real_BL].any(), "zero on padding"
    assert output.concept_lengths.sum() == 17
    assert len(output.concept_lengths) == output.cu_concepts[-1] == output.boundaries.sum()
    per_document = output.boundaries.sum(1)
    assert output.cu_concepts.diff().tolist() == per_document.tolist()
    assert output.parser_statistics.tokens == 17 and output.parser_statistics.documents == 3


def test_concept_lengths_are_the_distances_between_boundaries():
    document = random_documents([20], seed=3)[0]
    output = tiny_dlcm(3, visibility="closed")(document[None])
    starts = [*output.boundaries[0].nonzero().flatten().tolist(), 20]
    assert output.concept_lengths.tolist() == [b - a for a, b in itertools.pairwise(starts)]


def test_output_of_the_baseline():
    batch = arrange(random_documents([5, 9, 3], seed=2), "left_padded")
    output = tiny_baseline(2)(**batch.inputs, labels=batch.labels)
    assert output.logits.shape == (3, 9, VOCABULARY)
    assert output.loss == output.ce_loss
    assert not output.logits[~batch.real_BL].any()


@pytest.mark.parametrize("build", BUILDERS)
def test_without_labels_there_is_no_loss(build):
    output = build()(torch.arange(6)[None])
    assert output.loss is None and output.ce_loss is None


@pytest.mark.parametrize("build", BUILDERS)
def test_return_dict_false_gives_the_same_as_a_tuple(build):
    ids_BL, model = torch.stack(random_documents([9, 9], seed=0)), build()
    named, plain = model(ids_BL, labels=ids_BL), model(ids_BL, labels=ids_BL, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named)
    assert torch.equal(plain[0], named.loss) and torch.equal(plain[1], named.logits)


# Losses


def loop_cross_entropy(logits_TV: Tensor, labels_T: Tensor, lengths: list[int]) -> tuple[float, int]:
    """Sum of next-token losses inside each document, and the number of targets."""
    total, targets, start = 0.0, 0, 0
    for length in lengths:
        for t in range(start, start + length - 1):
            label = int(labels_T[t + 1])
            if label != -100:
                total -= float(logits_TV[t].log_softmax(0)[label])
                targets += 1
        start += length
    return total, targets


@pytest.mark.parametrize("arrangement", ["packed", "left_padded", "right_padded"])
@pytest.mark.parametrize("build", BUILDERS)
def test_loss_by_hand(build, arrangement: str):
    lengths = [6, 1, 9]
    batch, model = arrange(random_documents(lengths, seed=4), arrangement), build(4)
    labels = batch.labels.clone()
    labels[0, -2] = -100  # inside a document of every arrangement, or on padding
    output = model(**batch.inputs, labels=labels)
    total, targets = loop_cross_entropy(batch.tokens_of(output.logits.detach()), batch.tokens_of(labels), lengths)
    assert output.ce_loss.item() == pytest.approx(total / targets, abs=1e-10)

    shared = model(**batch.inputs, labels=labels, num_items_in_batch=100)
    assert shared.ce_loss.item() == pytest.approx(total / 100, abs=1e-10)
    counted = model(**batch.inputs, labels=labels, num_items_in_batch=torch.tensor(100))
    assert torch.equal(counted.ce_loss, shared.ce_loss)


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("build", BUILDERS)
def test_no_target_at_all_is_no_loss(build, return_logits: bool):
    output = build()(torch.arange(6)[None], labels=torch.full((1, 6), -100), return_logits=return_logits)
    assert output.ce_loss == 0


@pytest.mark.parametrize("num_items", [None, 100, torch.tensor(100)], ids=str)
@pytest.mark.parametrize("arrangement", ["packed", "left_padded", "right_padded"])
@pytest.mark.parametrize("build", BUILDERS)
def test_without_logits_loss_and_gradients_are_the_same(
    build, arrangement: str, num_items: int | Tensor | None, monkeypatch: pytest.MonkeyPatch
):
    """Over several chunks, at a token width other than muP's base."""
    chunked = functools.partial(linear_cross_entropy, chunk_tokens=5)
    monkeypatch.setattr("dlcm.causal_lm.linear_cross_entropy", chunked)
    batch, model = arrange(random_documents([6, 1, 9], seed=4), arrangement), build(4)
    labels = batch.labels.clone()
    labels[0, -2] = -100
    assert model.config.token_width_multiplier == 2
    results = []
    for return_logits in (True, False):
        model.zero_grad()
        inputs = {**batch.inputs, "labels": labels, "num_items_in_batch": num_items, "return_logits": return_logits}
        output = model(**inputs)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.loss.detach(), output.ce_loss.detach(), gradients))
    assert output.logits is None and "logits" not in output
    assert model.lm_head.weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", BUILDERS)
def test_neither_logits_nor_labels_is_refused(build):
    with pytest.raises(ValueError, match="return_logits=False needs labels"):
        build()(torch.arange(6)[None], return_logits=False)


@pytest.mark.parametrize("build", BUILDERS)
def test_without_logits_the_head_is_not_called_and_compiled_is_passed_on(build, monkeypatch: pytest.MonkeyPatch):
    compiled = []

    def spy(*arguments: Tensor, **options: bool) -> Tensor:
        compiled.append(options["compiled"])
        return linear_cross_entropy(*arguments)

    monkeypatch.setattr("dlcm.causal_lm.linear_cross_entropy", spy)
    model, ids_BL = build(), torch.arange(6)[None]
    model.lm_head.register_forward_pre_hook(lambda module, inputs: pytest.fail("logits of every token"))
    for model.compiled in (False, True):
        model(ids_BL, labels=ids_BL, return_logits=False)
    assert compiled == [False, True]


@pytest.mark.parametrize("build", BUILDERS)
def test_labels_are_left_as_they_were(build):
    labels = torch.arange(6)[None]
    build()(labels, labels=labels, cu_seqlens=torch.tensor([0, 2, 6]))
    assert labels.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("weight", [0.0, 0.03, 2.0])
def test_loss_of_the_dlcm_adds_the_ratio_loss(weight: float):
    ids_BL = torch.stack(random_documents([12, 12], seed=5))
    output = tiny_dlcm(5, aux_loss_weight=weight)(ids_BL, labels=ids_BL)
    torch.testing.assert_close(output.loss, output.ce_loss + weight * output.aux_loss)
    f, g, ratio = output.boundaries.double().mean(), output.boundary_probs.mean(), 2.5
    torch.testing.assert_close(output.aux_loss, ratio / (ratio - 1) * (1.5 * f * g + (1 - f) * (1 - g)) - 1)


def test_sharpening_can_be_scheduled():
    model = tiny_dlcm(5).train()
    model.set_sharpening(1e9)
    ids_BL = torch.stack(random_documents([30, 30], seed=5))
    drawn = [model(ids_BL, generator=torch.Generator().manual_seed(seed)).boundaries for seed in (0, 1)]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="segmenter='rule' draws no boundaries"):
        tiny_dlcm(segmenter="rule").set_sharpening(2.0)


# The baseline is LLaMA


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("base_width", [None, 8, 64])
def test_to_llama_gives_the_same_logits(kv_heads: int, base_width: int | None):
    model = tiny_baseline(
        8, token_kv_heads=kv_heads, mup_base_width=base_width, rope_theta=500.0, rms_norm_eps=1e-3
    ).float()
    llama = model.to_llama()
    ids_BL = torch.stack(random_documents([40, 40], seed=8))
    logits = model(ids_BL).logits
    assert logits.std() > 0.1, "flat logits would prove nothing"
    torch.testing.assert_close(llama(ids_BL).logits, logits, rtol=0, atol=1e-4)


def test_to_llama_agrees_on_loss_and_padding():
    model = tiny_baseline(8).float()
    llama = model.to_llama()
    batch = arrange(random_documents([9, 14], seed=8), "left_padded")
    ours, theirs = model(**batch.inputs, labels=batch.labels), llama(**batch.inputs, labels=batch.labels)
    torch.testing.assert_close(theirs.logits[batch.real_BL], ours.logits[batch.real_BL], rtol=0, atol=1e-4)
    # transformers scores the step from the last padding position to the first token; without it, losses agree
    rows = torch.stack(random_documents([12, 12], seed=9))
    torch.testing.assert_close(llama(rows, labels=rows).loss, model(rows, labels=rows).loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_to_llama_copies(dtype: torch.dtype, training: bool):
    model = tiny_baseline(8).to(dtype).train(training)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    llama = model.to_llama()
    assert llama.dtype == dtype and llama.training == training
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in llama.parameters())
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_to_llama_needs_a_model_without_qk_norm():
    with pytest.raises(ValueError, match="qk_norm=false"):
        tiny_baseline(qk_norm=True).to_llama()


@pytest.mark.parametrize("every", [None, 1])
def test_to_llama_needs_a_model_without_windows(every: int | None):
    with pytest.raises(ValueError, match="token_window=null"):
        tiny_baseline(token_window=3, global_every=every).to_llama()


# Numerics


@pytest.mark.parametrize("options", [{"segmenter": "fixed"}, {"segmenter": "learned"}, {"segmenter": "rule"}])
def test_bf16_autocast_stays_close(options: dict):
    """Freshly initialised, as at the start of training. Boundaries near the threshold may fall the other way."""
    torch.manual_seed(0)
    model = DLCMForCausalLM(tiny_config(initializer_range=0.3, **options)).eval()
    ids_BL = torch.stack(random_documents([30] * 4, seed=10))
    exact = model(ids_BL, labels=ids_BL)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids_BL, labels=ids_BL)
    assert rounded.boundary_probs.dtype == torch.float32 and rounded.ce_loss.dtype == torch.float32
    torch.testing.assert_close(rounded.boundary_probs, exact.boundary_probs, rtol=0, atol=0.03)
    torch.testing.assert_close(rounded.ce_loss, exact.ce_loss, rtol=0.02, atol=0)
    if options["segmenter"] == "fixed":
        error = (rounded.logits.float() - exact.logits).norm() / exact.logits.norm()
        assert error < 0.03
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(ids_BL, labels=ids_BL).loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_bf16_autocast_of_the_baseline_stays_close():
    torch.manual_seed(0)
    model = LlamaBaselineForCausalLM(tiny_baseline_config(initializer_range=0.3))
    ids_BL = torch.stack(random_documents([30] * 4, seed=10))
    exact = model(ids_BL, labels=ids_BL)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids_BL, labels=ids_BL)
        rounded.loss.backward()
    assert (rounded.logits.float() - exact.logits).norm() < 0.03 * exact.logits.norm()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# Learning


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_reach_every_parameter(visibility: str, qk_norm: bool):
    later = {"cross_attention_every": 1, "decoder_layers": 2}
    model = tiny_dlcm(11, visibility=visibility, qk_norm=qk_norm, **later).train()
    batch = arrange(random_documents([20, 13], seed=11), "packed")
    model(**batch.inputs, labels=batch.labels, generator=torch.Generator().manual_seed(0)).loss.backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9}
    # the first token closes a concept under `inclusive`, so that no position reads "no concept yet"
    null_slots = {"cross_attention.null_slot", "later_cross_attention.0.null_slot"}
    assert unreached == (null_slots if visibility == "inclusive" else set())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradients_reach_every_parameter_of_the_baseline(qk_norm: bool):
    model = tiny_baseline(11, qk_norm=qk_norm)
    batch = arrange(random_documents([20, 13], seed=11), "packed")
    model(**batch.inputs, labels=batch.labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-9 for p in model.parameters())


def memorise(model, documents: list[Tensor], steps: int) -> float:
    """Cross-entropy at evaluation after `steps` of AdamW on the same documents."""
    batch = arrange(documents, "packed")
    groups = parameter_groups(
        model, model.config, lr_token=1e-2, lr_concept=1e-2, lr_boundary=1e-3, lr_other=1e-2, eps=1e-8, weight_decay=0.0
    )
    optimizer = torch.optim.AdamW(groups)
    torch.manual_seed(0)  # boundary draws
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch.inputs, labels=batch.labels).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(model(**batch.inputs, labels=batch.labels).ce_loss)


def memorable_documents() -> list[Tensor]:
    """Random tokens: nothing can be learnt but the documents. They differ from the first token on."""
    documents = random_documents([24, 17, 30, 9], seed=12)
    for first, document in enumerate(documents):
        document[0] = first
    return documents


LEARNABLE = {"d_token": 32, "token_heads": 4, "token_kv_heads": 2, "token_ffn": 64, "mup_base_width": 32}


@pytest.mark.parametrize(
    "options",
    [
        {"segmenter": "learned", "visibility": "closed", "sharpening": 4.0},
        {"segmenter": "rule", "visibility": "inclusive"},
        {"segmenter": "fixed", "visibility": "closed"},
    ],
    ids=lambda options: options["segmenter"],
)
def test_a_tiny_dlcm_memorises_a_few_documents(options: dict):
    torch.manual_seed(0)
    config = tiny_config(**LEARNABLE, d_concept=48, initializer_range=0.1, backbone_layers=1, **options)
    assert memorise(DLCMForCausalLM(config).train(), memorable_documents(), steps=40) < 0.1


def test_a_tiny_baseline_memorises_a_few_documents():
    torch.manual_seed(0)
    model = LlamaBaselineForCausalLM(tiny_baseline_config(**LEARNABLE, initializer_range=0.1)).train()
    assert memorise(model, memorable_documents(), steps=40) < 0.1


def test_without_any_training_nothing_is_memorised():
    """Negative control: the loss begins at that of a guess."""
    torch.manual_seed(0)
    model = DLCMForCausalLM(tiny_config(**LEARNABLE, d_concept=48))
    assert memorise(model, memorable_documents(), steps=0) == pytest.approx(math.log(VOCABULARY), abs=0.3)


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_concepts_carry_information_across_segments(visibility: str):
    """Tokens read what the backbone made of earlier segments: without it, later logits change."""
    model = tiny_dlcm(13, segmenter="fixed", visibility=visibility)
    (document,) = random_documents([12], seed=13)
    logits = model(document[None]).logits[0]
    model.backbone_norm.register_forward_hook(lambda module, inputs, z_MC: torch.zeros_like(z_MC))
    change_T = (model(document[None]).logits[0] - logits).abs().amax(1)
    first = 0 if visibility == "inclusive" else 3  # closed: R = 2.5 begins the second concept at token 3
    assert bool((change_T[:first] == 0).all()) and bool((change_T[first:] > 1e-3).all())
