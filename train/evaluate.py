"""Validation during training: loss and bits per byte with boundaries as at inference."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from train.config import RunConfig
from train.data import Mixture, PackedBatch, TokenShards, validation_batches
from train.distributed import Ranks
from train.metrics import bits_per_byte
from train.step import Model, autocast, model_inputs


@torch.no_grad()
def evaluate(run: RunConfig, model: Model, validation: TokenShards | Mixture, ranks: Ranks) -> dict[str, float]:
    """Loss (nats per target) and bits per byte over the validation split, up to `evaluation.max_tokens`.

    For a model with concepts also tokens per concept, and the length of the longest one in tokens. Of a mixture, each
    source is evaluated on its share of `max_tokens`, and numbers are those of text mixed as in training, whatever the
    splits' sizes; bits per byte of each source stand beside them, as `bpb/NAME`. Batches are shared out among ranks;
    the model is left in training mode.
    """
    mixture = Mixture.of(validation)
    model.eval()
    # What only the device knows stays there until the last batch, so that no batch waits for the one before it.
    nats_S = torch.zeros(len(mixture.shards), dtype=torch.float64, device=model.device)
    longest = torch.zeros((), dtype=torch.int64, device=model.device)
    sums = torch.zeros(len(mixture.shards), 5, dtype=torch.float64)  # nats, targets, target bytes, tokens, concepts
    for source, (shards, share) in enumerate(zip(mixture.shards, mixture.shares, strict=True)):
        most = None if run.evaluation.max_tokens is None else max(2, round(share * run.evaluation.max_tokens))
        batches = validation_batches(shards, run.data.sequence_length, run.batch.rows, most)
        for batch, counts in share_of(ranks, batches):
            batch = batch.to(model.device)
            inputs = model_inputs(batch)
            inputs |= {"labels": batch.labels[None], "num_items_in_batch": 1, "return_logits": False}
            with autocast(run, model.device):
                output = model(**inputs)
            if not counts:  # only sharded models needed it
                continue
            nats_S[source] += output.ce_loss
            concepts = len(output.concept_lengths) if "concept_lengths" in output else 0
            sums[source, 1:] += torch.tensor([batch.num_targets, batch.target_bytes, len(batch.input_ids), concepts])
            if concepts:
                longest = torch.maximum(longest, output.concept_lengths.max())
    model.train()

    sums[:, 0] = nats_S.cpu()
    sums = ranks.sum(sums)
    max_concept = ranks.max(int(longest))
    nats, targets, target_bytes, tokens, concepts = as_mixed(sums, mixture.shares).tolist()
    values = {"loss": nats / targets, "bpb": bits_per_byte(nats, target_bytes)}
    if concepts:
        values |= {"tokens_per_concept": tokens / concepts, "max_concept": max_concept}
    if len(mixture.shards) > 1:
        for name, (nats, _, target_bytes, *_) in zip(mixture.names, sums.tolist(), strict=True):
            values[f"bpb/{name}"] = bits_per_byte(nats, target_bytes)
    return values


def as_mixed(sums: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """(5,): the sums over sources (S, 5), each weighed until its targets are its share of all."""
    targets_S = sums[:, 1]
    scale_S = torch.tensor(shares, dtype=torch.float64) * (targets_S.sum() / targets_S)
    return (scale_S[:, None] * sums).sum(0)


def share_of(ranks: Ranks, batches: Iterator[PackedBatch]) -> Iterator[tuple[PackedBatch, bool]]:
    """This rank's batches, and whether they count.

    Every rank gets as many, since sharded models run together: where one would lack its last, it gets another's.
    """
    while turn := list(islice(batches, ranks.size)):
        counts = ranks.rank < len(turn)
        yield turn[ranks.rank if counts else 0], counts
