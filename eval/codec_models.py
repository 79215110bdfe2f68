"""How well a model predicts once its matrices, or the keys and values of its past, have been through a codec.

A trial is one way to compress one checkpoint. Bits are those of what was compressed, all side information counted; what
is small, and every vector, stays as it is, and is not counted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlcm.codec import OldBlocks, Quantised, round_to_nearest
from dlcm.codec.state import is_coded, widths_by_cost
from eval.bench import Row
from eval.calibration import Model, error_costs, input_hessians, windows_of
from eval.codec import Mode
from eval.codec_methods import GPTQ, ROUNDERS, code
from eval.loading import EvaluationError, LoadedCheckpoint, encode_document, load_checkpoint
from eval.perplexity import score_documents
from eval.scoring import Scorer
from train.documents import Document
from train.metrics import bits_per_byte

# Names of matrices begin so; the projection up to concept width belongs to the boundary between tokens and concepts.
STAGES = {
    "embedding": ("embed_tokens.",),
    "encoder": ("encoder.",),
    "boundary": ("detector.", "pooling."),
    "backbone": ("backbone.", "smoothing."),
    "cross-attention": ("cross_attention.", "later_cross_attention."),
    "decoder": ("decoder.",),
    "head": ("lm_head.",),
}
BLOCK, FIRST, RECENT = 64, 4, 64  # of tokens, or concepts, of a past that is compressed


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to compress a model's matrices.

    Attributes:
        method: of `eval.codec_methods`; None leaves all as it is.
        budget: mean bits a value; of rounders, whole bits, scales beside them.
        mode: how the mean is met (see `dlcm.codec.allocation`).
        stage: of STAGES, whose matrices alone are compressed; None: all.
    """

    method: str | None
    budget: float | None = None
    mode: Mode = "uniform"
    stage: str | None = None


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents that tell of a model, and others to score it on."""

    calibration: list[Document]
    scored: list[Document]


def run_trial(checkpoint: Path, trial: Trial, texts: Texts) -> Row:
    """Compresses and scores.

    Raises:
        CodecError: a budget out of reach; names the matrix.
        EvaluationError: the model has no such stage.
    """
    loaded = load_checkpoint(checkpoint)
    row: Row = {"method": trial.method, "budget": trial.budget, "mode": trial.mode, "stage": trial.stage}
    if trial.method is not None:
        row |= compress_model_(loaded.model, trial, _windows(loaded, texts))
    return row | score(loaded, texts.scored)


def compress_model_(model: Model, trial: Trial, windows: Sequence[Tensor]) -> Row:
    """Replaces matrices by what comes back of them; values, bits, and squared error over squared values."""
    assert trial.method is not None and trial.budget is not None
    matrices = {name: x.detach() for name, x in model.named_parameters() if is_coded(name, x)}
    if trial.stage is not None:
        matrices = {name: x for name, x in matrices.items() if name.startswith(STAGES[trial.stage])}
    if not matrices:
        raise EvaluationError(f"no matrix of {trial.stage or 'the model'} is large enough; leave it out")
    widths = widths_of(trial, matrices, error_costs(model, windows) if trial.mode == "hessian" else None)
    hessians = input_hessians(model, windows) if trial.method == GPTQ else {}
    bits = error = energy = 0.0
    for name, x in matrices.items():
        original = x.float().cpu()
        coded = code(trial.method, original, widths[name], hessians.get(name))
        bits += coded.bits * x.numel()
        error += (coded.tensor.double() - original.double()).square().sum().item()
        energy += original.double().square().sum().item()
        x.copy_(coded.tensor)
    values = sum(x.numel() for x in matrices.values())
    return {"values": values, "bits": bits / values, "rel_mse": error / energy}


def widths_of(trial: Trial, matrices: Mapping[str, Tensor], costs: Mapping[str, float] | None) -> dict[str, float]:
    """Bits of each matrix."""
    assert trial.budget is not None
    if trial.mode == "uniform":
        return dict.fromkeys(matrices, trial.budget)
    return widths_by_cost(matrices, list(matrices), costs or dict.fromkeys(matrices, 1.0), trial.budget)


def score(loaded: LoadedCheckpoint, documents: Sequence[Document]) -> Row:
    """Bits per byte."""
    numbers = score_documents(Scorer(loaded.model, loaded.tokenizer), documents, None, None, "scoring")
    num_bytes = sum(of.num_bytes for of in numbers)
    return {"bits_per_byte": bits_per_byte(math.fsum(of.nats for of in numbers), num_bytes), "bytes": num_bytes}


def _windows(loaded: LoadedCheckpoint, texts: Texts) -> list[Tensor]:
    return windows_of(loaded.tokenizer, texts.calibration, loaded.model.config.max_position_embeddings)


def run_past_trial(checkpoint: Path, method: str | None, level: int, documents: Sequence[Document]) -> Row:
    """Scores the beginnings of documents, read in pieces of BLOCK tokens, with what is old of their past compressed.

    Args:
        method: of `eval.codec_methods`; it gets as many bits as rounding to nearest takes to `level` bits. None leaves
            all as it is.

    Raises:
        CodecError: see `compress`.
        EvaluationError: no document has two tokens.
    """
    loaded = load_checkpoint(checkpoint)
    nats = bits = seconds = 0.0
    num_bytes = tokens = values = 0

    def coded(x: Tensor) -> Quantised:
        assert method is not None
        return code(method, x, level if method in ROUNDERS else round_to_nearest(x, level).bits)

    for document in documents:
        encoded = encode_document(loaded.tokenizer, document.text)
        ids_1T = encoded.input_ids_1T[:, : loaded.model.config.max_position_embeddings]
        blocks = OldBlocks(coded, BLOCK, FIRST, RECENT)
        if ids_1T.shape[1] > 1:
            nats += _nats_with_past(loaded.model, ids_1T, None if method is None else blocks)
            num_bytes += len(document.text[encoded.end_T[0] : encoded.end_T[ids_1T.shape[1] - 1]].encode())
        bits, values, seconds = bits + blocks.bits, values + blocks.values, seconds + blocks.seconds
        tokens += ids_1T.shape[1]
    if not num_bytes:
        raise EvaluationError("no document has two tokens; give other text")
    row: Row = {"method": method, "level": level, "bits": bits / values if values else None, "tokens": tokens}
    row |= {"mvalues_per_second": values / 1e6 / seconds if seconds else None, "bytes": num_bytes}
    return row | {"bits_per_byte": bits_per_byte(nats, num_bytes)}


@torch.no_grad()
def _nats_with_past(model: Model, ids_1T: Tensor, blocks: OldBlocks | None) -> float:
    """Of all tokens but the first."""
    cache, nats, start = model.new_cache(ids_1T.shape[1]), 0.0, 0
    ids_1T = ids_1T.to(model.device)
    for ids_1t in ids_1T.split(BLOCK, 1):
        logits_tV = model(input_ids=ids_1t, past_key_values=cache).logits[0].float()
        target_t = ids_1T[0, start + 1 : start + 1 + len(logits_tV)]
        nats += torch.nn.functional.cross_entropy(logits_tV[: len(target_t)], target_t, reduction="sum").item()
        start += len(logits_tV)
        if blocks is not None:
            blocks.compress_(cache)
    return nats
