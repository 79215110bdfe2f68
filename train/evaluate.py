"""Validation during training: loss and bits per byte with boundaries as at inference."""

import torch

from train.config import RunConfig
from train.data import TokenShards, validation_batches
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
    nats = targets = target_bytes = tokens = concepts = 0.0
    longest = 0
    batches = validation_batches(validation, run.data.sequence_length, run.batch.rows, run.evaluation.max_tokens)
    for index, batch in enumerate(batches):
        if index % ranks.size != ranks.rank:
            continue
        batch = batch.to(model.device)
        with autocast(run, model.device):
            output = model(**model_inputs(batch), labels=batch.labels[None], num_items_in_batch=1)
        nats += float(output.ce_loss)
        targets += batch.num_targets
        target_bytes += batch.target_bytes
        tokens += len(batch.input_ids)
        if "concept_lengths" in output:
            concepts += len(output.concept_lengths)
            longest = max(longest, int(output.concept_lengths.max()))
    model.train()

    sums = torch.tensor([nats, targets, target_bytes, tokens, concepts], dtype=torch.float64)
    nats, targets, target_bytes, tokens, concepts = ranks.sum(sums).tolist()
    longest = ranks.max(longest)
    values = {"loss": nats / targets, "bpb": bits_per_byte(nats, target_bytes)}
    if concepts:
        values |= {"tokens_per_concept": tokens / concepts, "max_concept": longest}
    return values
