"""FSDP2 over two processes changes neither loss nor gradients, with the fused kernel, and with blocks recomputed."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dlcm import DLCMForCausalLM
from dlcm.blocks import recompute_blocks_
from dlcm.layout import ConceptRooms
from tests.conftest import random_documents, tiny_dlcm
from tests.ranks import run_two_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernel in Triton's interpreter")
SETTINGS = {"plain": False, "recomputed": True}


def small_model() -> DLCMForCausalLM:
    """The same on every rank; float32, since the kernel has no float64."""
    return tiny_dlcm(0, cross_attention_backend="ragged", segmenter="rule", d_token=64).float()


def losses_and_gradients(model: DLCMForCausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one packed row, the same on every rank: the average over ranks is the gradient of one."""
    documents = random_documents([17, 1, 22], 0)
    cu_seqlens = torch.tensor([0, *map(len, documents)]).cumsum(0)
    ids = torch.cat(documents)[None]
    loss = model.train()(ids, labels=ids, cu_seqlens=cu_seqlens, return_logits=False).loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return loss.detach(), gradients


def rank_main(rank: int, directory: str) -> None:
    for name, recompute in SETTINGS.items():
        model = small_model()
        recompute_blocks_(model, recompute)
        for stack in (model.encoder, model.backbone, model.decoder):
            for block in stack.layers:
                fully_shard(block)
        fully_shard(model.cross_attention)
        fully_shard(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        results = losses_and_gradients(model)
        if rank == 0:
            torch.save(results, f"{directory}/{name}.pt")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_two_ranks(rank_main, directory)
    return directory


@pytest.mark.parametrize("name", SETTINGS)
def test_sharded_is_whole(name: str, directory: Path):
    loss, gradients = torch.load(directory / f"{name}.pt", weights_only=True)
    whole_loss, whole = losses_and_gradients(small_model())
    torch.testing.assert_close(loss, whole_loss)
    assert gradients.keys() == whole.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, whole[parameter], rtol=1e-4, atol=1e-6, msg=lambda m, p=parameter: f"{p}: {m}"
        )
    assert whole["cross_attention.k_proj.weight"].norm() > 0


STEPS = 4


def foreseeing_rank_main(rank: int, directory: str) -> None:
    """In turn, ranks see a text of many concepts after one of few, for which the room foreseen is not enough."""
    sharded, whole = small_model(), small_model()
    for block in sharded.backbone.layers:
        fully_shard(block)
    fully_shard(sharded)
    sharded.concept_rooms = rooms = ConceptRooms(2, foresight=True)
    rooms.MEMORY, missed = 1, []
    for step in range(STEPS):
        documents = random_documents([17, 1, 22], 10 * step + rank)
        ids, cu_seqlens = torch.cat(documents)[None], torch.tensor([0, *map(len, documents)]).cumsum(0)
        if (step + rank) % 2 == 0:
            ids = torch.ones_like(ids)  # no token differs from the one before
        losses, before = [], rooms.misses
        for model in (sharded, whole):
            losses.append(model.train()(ids, labels=ids, cu_seqlens=cu_seqlens, return_logits=False).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        missed.append(rooms.misses > before)
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        found = sharded.get_parameter(name).grad
        assert isinstance(found, DTensor)
        torch.testing.assert_close(found.full_tensor(), parameter.grad / 2, rtol=1e-4, atol=1e-6)
    Path(f"{directory}/{rank}").write_text(str(missed))


def test_ranks_run_the_same_passes_whoever_lacked_room(tmp_path: Path):
    run_two_ranks(foreseeing_rank_main, tmp_path)
    one, other = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert one == other == "[False, True, True, True]"
