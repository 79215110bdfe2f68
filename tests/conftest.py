"""What the tests share: models small enough to enumerate, and documents arranged in every way a model accepts.

Helpers are plain functions, imported as `from tests.conftest import tiny_dlcm`; hypothesis draws the same
examples in every run.
"""

import os
import random
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import settings
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; triton reads it when it is imported

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.causal_lm import IGNORED, PackedCausalLM

# torch.compile on the CPU writes C++.
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile on the CPU needs a C++ compiler and Python's headers",
)
# triton is for Linux alone
NEED_TRITON = ["dlcm/test_decode_attention.py", "dlcm/test_ragged_attention.py", "dlcm/test_sharding.py"]
NEED_TRITON += ["eval/test_bench_attention.py"]
collect_ignore = [] if find_spec("triton") else NEED_TRITON

settings.register_profile("dlcm", derandomize=True, deadline=None, database=None)
settings.load_profile("dlcm")
torch.set_num_threads(1)  # for matrices this small, threads only cost

VOCABULARY = 23
WORD_ENDS = list(range(0, VOCABULARY, 2))  # for segmenter="words"


@pytest.fixture(scope="session", autouse=True)
def collector_is_not_spared() -> Iterator[None]:
    """The full collection takes longer than the steps of a tiny run; tests/train/test_pretrain.py has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.pretrain.spare_the_collector", lambda: None)
        yield


def tiny_config(**overrides: Any) -> DLCMConfig:
    """A DLCM of a few thousand parameters, with grouped heads and no two widths alike."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_token": 16,
        "token_heads": 4,
        "token_kv_heads": 2,
        "token_ffn": 28,
        "d_concept": 24,
        "concept_heads": 6,
        "concept_kv_heads": 3,
        "concept_ffn": 40,
        "encoder_layers": 1,
        "backbone_layers": 2,
        "decoder_layers": 1,
        "target_ratio": 2.5,
        "max_position_embeddings": 64,
        "mup_base_width": 8,
    }
    if overrides.get("segmenter") == "words":
        fields["word_end_ids"] = WORD_ENDS
    return DLCMConfig(**fields | overrides)


def tiny_baseline_config(**overrides: Any) -> LlamaBaselineConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_token": 16,
        "token_heads": 4,
        "token_kv_heads": 2,
        "token_ffn": 28,
        "num_layers": 2,
        "max_position_embeddings": 64,
        "mup_base_width": 8,
    }
    return LlamaBaselineConfig(**fields | overrides)


def tiny_dlcm(seed: int = 0, **overrides: Any) -> DLCMForCausalLM:
    """A tiny DLCM in float64 and evaluation mode, its weights as large as a trained model's."""
    model = DLCMForCausalLM(tiny_config(**overrides))
    trained_scale_(model, seed)
    return model.double().eval()


def tiny_baseline(seed: int = 0, **overrides: Any) -> LlamaBaselineForCausalLM:
    """A tiny baseline in float64 and evaluation mode, its weights as large as a trained model's."""
    model = LlamaBaselineForCausalLM(tiny_baseline_config(**overrides))
    trained_scale_(model, seed)
    return model.double().eval()


@torch.no_grad()
def trained_scale_(model: PackedCausalLM, seed: int) -> None:
    """Draws every parameter anew: matrices that keep the scale of what they multiply, nothing left at 0 or 1.

    At their initial values attention is flat, smoothing is the identity and embeddings are nearly zero: a
    neighbour or a later token would hardly be seen even where the model looks at it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("_proj.weight"):
            parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_(noise)


# Every option that changes what the model computes, for tests that draw any combination of them.
CHOICES: dict[str, Sequence[Any]] = {
    "segmenter": ("learned", "rule", "fixed", "words"),
    "visibility": ("closed", "inclusive"),
    "smoothing": ("adjacent", "none"),
    "cross_attention_rope": (True, False),
    "slot_weighting": ("replication", "uniform"),
    "injection": ("off", "first", "every", "closing"),
    "cross_attention": (True, True, False),
    "clean_start": (False, True),
    "qk_norm": (False, True),
    "decoder_layers": (1, 2),
    "cross_attention_every": (None, 1),
    "pooling": ("mean", "last"),
    "token_window": (None, 1, 3),
}


def random_options(seed: int) -> dict[str, Any]:
    """One of all combinations of `CHOICES` that are possible."""
    generator = random.Random(seed)
    options = {name: generator.choice(values) for name, values in CHOICES.items()}
    if not options["cross_attention"]:
        options["cross_attention_every"] = None
        options["injection"] = generator.choice(CHOICES["injection"][1:])
    return options


def random_documents(lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Documents of the given lengths, uniform tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


Arrangement = Literal["rows", "left_padded", "right_padded", "packed"]
ARRANGEMENTS: tuple[Arrangement, ...] = ("rows", "left_padded", "right_padded", "packed")


@dataclass(frozen=True)
class Batch:
    """Documents as a model's input: `inputs` are arguments of `forward`, `real_BL` marks what is no padding."""

    inputs: dict[str, Tensor]
    real_BL: Tensor

    @property
    def labels(self) -> Tensor:
        return self.inputs["input_ids"].masked_fill(~self.real_BL, IGNORED)

    def tokens_of(self, x_BL: Tensor) -> Tensor:
        """(T, ...): what belongs to real tokens, document after document, whatever the arrangement."""
        return x_BL[self.real_BL]


def arrange(documents: Sequence[Tensor], arrangement: Arrangement) -> Batch:
    """The documents as rows of one length, as padded rows, or end to end in one row."""
    if arrangement == "packed":
        row_BL = torch.cat(list(documents))[None]
        lengths = torch.tensor([len(document) for document in documents])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return Batch({"input_ids": row_BL, "cu_seqlens": cu_seqlens}, torch.ones_like(row_BL, dtype=torch.bool))
    if arrangement == "rows":
        rows_BL = torch.stack(list(documents))
        return Batch({"input_ids": rows_BL}, torch.ones_like(rows_BL, dtype=torch.bool))
    longest = max(len(document) for document in documents)
    padding = 5  # an ordinary token: nothing but the mask may tell it from text
    rows_BL = torch.full((len(documents), longest), padding)
    real_BL = torch.zeros_like(rows_BL, dtype=torch.bool)
    for row, document in enumerate(documents):
        start = longest - len(document) if arrangement == "left_padded" else 0
        rows_BL[row, start : start + len(document)] = document
        real_BL[row, start : start + len(document)] = True
    return Batch({"input_ids": rows_BL, "attention_mask": real_BL.long()}, real_BL)
