"""Validation during training: loss and bits per byte with boundaries as at inference."""

from collections.abc import Iterator
from itertools import islice

import torch

from train.config import RunConfig
from train.data import PackedBatch, TokenShards, validation_batches
from train.distributed import Ranks
from train.metrics import bits_per_byte
from train.step import Model, autocast, model_inputs


@torch.no_grad()
def evaluate(run: RunConfig, model: Model, validation: TokenShards, ranks: Ranks) -> dict[str, float]:
    """Loss (nats per target) and bits per byte over the validation split, up to `evaluation.max_tokens`.

    For a model with concepts also tokens per concept, and the length of the longest one in tokens. Batches are
    shared out among ranks; the model is left in training mode.
    """
    model.eval()
    targets = target_bytes = tokens = concepts = 0.0
    # What only the device knows stays there until the last batch, so that no batch waits for the one before it.
    nats = torch.zeros((), dtype=torch.float64, device=model.device)
    longest = torch.zeros((), dtype=torch.int64, device=model.device)
    batches = validation_batches(validation, run.data.sequence_length, run.batch.rows, run.evaluation.max_tokens)
    for batch, counts in share_of(ranks, batches):
        batch = batch.to(model.device)
        inputs = model_inputs(batch) | {"labels": batch.labels[None], "num_items_in_batch": 1, "return_logits": False}
        with autocast(run, model.device):
            output = model(**inputs)
        if not counts:  # only sharded models needed it
            continue
        nats += output.ce_loss
        targets += batch.num_targets
        target_bytes += batch.target_bytes
        tokens += len(batch.input_ids)
        if "concept_lengths" in output:
            concepts += len(output.concept_lengths)
            longest = torch.maximum(longest, output.concept_lengths.max())
    model.train()

    sums = torch.tensor([float(nats), targets, target_bytes, tokens, concepts], dtype=torch.float64)
    total_nats, targets, target_bytes, tokens, concepts = ranks.sum(sums).tolist()
    max_concept = ranks.max(int(longest))
    values = {"loss": total_nats / targets, "bpb": bits_per_byte(total_nats, target_bytes)}
    if concepts:
        values |= {"tokens_per_concept": tokens / concepts, "max_concept": max_concept}
    return values


def share_of(ranks: Ranks, batches: Iterator[PackedBatch]) -> Iterator[tuple[PackedBatch, bool]]:
    """This rank's batches, and whether they count.

    Every rank gets as many, since sharded models run together: where one would lack its last, it gets another's.
    """
    while turn := list(islice(batches, ranks.size)):
        counts = ranks.rank < len(turn)
        yield turn[ranks.rank if counts else 0], counts
