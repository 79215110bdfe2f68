"""Runs small enough for tests: a slice of the embedded text in bytes, models of some ten thousand parameters."""

import json
import lzma
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from train.checkpoint import CHECKSUMS, KINDS, file_of, index_of
from train.data import file_sha256
from train.prepare import PrepareArguments, prepare

EMBEDDED = Path(__file__).parents[2] / "data" / "embedded.jsonl.xz"
DOCUMENTS = 24
CHARACTERS = 700  # of each document

MODELS: dict[str, dict[str, Any]] = {
    "dlcm": {
        "architecture": "dlcm",
        "vocab_size": 258,
        "d_token": 32,
        "token_heads": 4,
        "token_kv_heads": 2,
        "token_ffn": 64,
        "d_concept": 48,
        "concept_heads": 4,
        "concept_ffn": 96,
        "encoder_layers": 1,
        "backbone_layers": 1,
        "decoder_layers": 1,
        "target_ratio": 3,
        "max_position_embeddings": 64,
        "mup_base_width": 16,
    },
    "llama": {
        "architecture": "llama",
        "vocab_size": 258,
        "d_token": 32,
        "token_heads": 4,
        "token_kv_heads": 2,
        "token_ffn": 64,
        "num_layers": 2,
        "max_position_embeddings": 64,
        "mup_base_width": 16,
    },
}


def prepare_tiny(directory: Path) -> Path:
    """Prepares the beginnings of the first embedded documents with the byte tokenizer; returns the directory."""
    with lzma.open(EMBEDDED, "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(DOCUMENTS)]
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "tiny.jsonl"
    source.write_text("".join(json.dumps({"text": row["text"][:CHARACTERS]}) + "\n" for row in rows), encoding="utf-8")
    output = directory / "prepared"
    prepare(PrepareArguments(inputs=(str(source),), output=output, validation_fraction=0.2))
    return output


def write_config(path: Path, architecture: str, data: Path, output: Path, /, **sections: dict[str, Any]) -> Path:
    """A complete run as YAML: 8 steps of 4 windows of 32 bytes on one thread. `sections` are merged in."""
    content: dict[str, Any] = {
        "output": str(output),
        "seed": 1,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "max_bad_steps": 3,
        "model": dict(MODELS[architecture]),
        "data": {"path": str(data), "sequence_length": 32},
        "batch": {"rows": 4},
        "optimizer": {"lr_token": 3e-3, "lr_other": 3e-3},
        "schedule": {"steps": 8, "warmup_steps": 2, "decay_fraction": 0.25},
        "evaluation": {"every": 3, "max_tokens": 500},
        "checkpoint": {"every": 100},
    }
    if architecture == "dlcm":
        content["optimizer"]["lr_concept"] = 3e-3
        content["optimizer"]["lr_boundary"] = 3e-4
        content["schedule"]["sharpening_final"] = 4
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section if isinstance(section, dict) else section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def split_tensors(checkpoint: Path) -> None:
    """Makes a checkpoint one of two processes, whose tensors are in two files of each kind."""
    for kind in KINDS:
        whole = checkpoint / file_of(kind, 0, 1)
        tensors = load_file(whole)
        where = {name: file_of(kind, number % 2, 2) for number, name in enumerate(sorted(tensors))}
        for file in sorted(set(where.values())):
            part = {name: tensors[name].clone() for name in where if where[name] == file}
            save_file(part, checkpoint / file, {"format": "pt"})
        (checkpoint / index_of(kind)).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        whole.unlink()
    seal_checkpoint(checkpoint)


def seal_checkpoint(checkpoint: Path) -> None:
    """Writes the checksums of what is there."""
    listed = [path for path in checkpoint.iterdir() if path.is_file() and path.name != CHECKSUMS]
    (checkpoint / CHECKSUMS).write_text(json.dumps({path.name: file_sha256(path) for path in listed}))
