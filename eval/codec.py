"""Checkpoints through a tensor codec (LLM.265; see dlcm/codec).

    python -m eval.codec pack CHECKPOINT PACKED --bits 3.2 [--backend x264] [--transform hadamard] [--keep embed]
    python -m eval.codec pack CHECKPOINT PACKED --bits 3.2 --mode hessian --calibration novel.txt more.jsonl
    python -m eval.codec unpack PACKED CHECKPOINT
    python -m eval.codec inspect PACKED
    python -m eval.codec verify PACKED
    python -m eval.codec compare CHECKPOINT [--backends x264 entropy] [--levels 4 3 2] [--only 'layers.0']
    python -m eval.codec compare CHECKPOINT --calibration novel.txt
    python -m eval.codec rd CHECKPOINT TENSOR --bits 4 3.5 3 2.5 2

CHECKPOINT is a run directory, a checkpoint, or any directory of safetensors and a config.json, as `from_pretrained`
takes it. `pack` writes a directory of the same files, with `model.codec` in place of weights and optimizer. Matrices go
through the codec, what is small or has one dimension stays exact; `--bits` is the mean over all values of the file.

`--mode` says how many of them a matrix gets: as many as any other (uniform), what makes the squared error of all least
(mse), or the harm (hessian): squared errors times squared gradients on a calibration text. Matrices that no gradient
reaches, since they decide by a threshold, get the most then.

`unpack` turns it back into what `from_pretrained` and all of eval/ take. The optimizer is gone: an empty file stands
where verification looks for it, and a run cannot go on from here.

`compare` gives every tensor the bits of rounding to nearest in groups of 128 and tells whose error is least; rows named
"shuffled" are of the same tensors with the entries of each row in random order, and `entropy` has no codec at all: what
is better than neither is not the codec's merit. With a calibration text GPTQ joins, and a table of errors of outputs.
`rd` is the curve of one tensor.

Needs `pip install 'dlcm[codec]'`.
"""

import argparse
import functools
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlcm.codec import BACKENDS, TRANSFORMS, Blob, Container, compress_state, rate_distortion, save
from eval.bench import markdown_table
from eval.calibration import Model, error_costs, input_hessians, windows_of
from eval.codec_report import LEVELS, comparison, comparison_table
from eval.loading import EvaluationError, add_command, checkpoint_directory, load_checkpoint, positive, report_errors
from eval.perplexity import read_texts
from train.checkpoint import CHECKSUMS, file_of, tensor_files
from train.data import file_sha256
from train.export import new_directory
from train.saving import write_checksums

WEIGHTS = "model.codec"
Mode = Literal["uniform", "mse", "hessian"]
MODES: tuple[Mode, ...] = get_args(Mode)
COPIED = (".json", ".yaml", ".txt", ".jinja", ".model")  # configuration and tokenizer; nothing that is code or pickled


class Weights(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of all those of a model in a directory, each read when it is asked for.

    Raises:
        EvaluationError: there are none, or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [path] if path.is_file() else [path / name for name in tensor_files(path, "model")]
        if not all(file.is_file() for file in files):
            raise EvaluationError(f"{path}: no model*.safetensors here; give a checkpoint")
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise EvaluationError(f"{file}: no safetensors ({error}); use another checkpoint") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __reduce__(self) -> tuple[type["Weights"], tuple[Path]]:
        """Another process opens the files itself."""
        return Weights, (self.path,)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)


def pack(
    checkpoint: Path,
    output: Path,
    bits: float,
    keep: re.Pattern[str] | None,
    mode: Mode = "uniform",
    calibration: Sequence[str] = (),
    **options: Any,
) -> None:
    """Writes a packed directory.

    Raises:
        EvaluationError, CheckpointError: the checkpoint is damaged, or the output is there already.
        CodecError: see `compress_state`.
    """
    source = model_directory(checkpoint)
    weights = Weights(source)

    def tell(name: str, blob: Blob) -> None:
        print(f"{name}  {tuple(blob.shape)}  {blob.stream}  {blob.bits:.3f} bits", flush=True)

    with new_directory(output) as partial:
        costs = costs_of(mode, source, weights, calibration)
        blobs = compress_state(weights, bits, keep=keep, costs=costs, tell=tell, **options)
        save(partial / WEIGHTS, blobs)
        size, values = (partial / WEIGHTS).stat().st_size, sum(blob.numel for blob in blobs.values())
        _copy(source, partial)
        write_checksums(partial)
    print(f"{output}: {values:,} values, {size:,} bytes, {8 * size / values:.4f} bits a value")


def costs_of(mode: Mode, checkpoint: Path, weights: Weights, texts: Sequence[str]) -> dict[str, float] | None:
    """What errors of matrices cost (see `dlcm.codec.allocation`); None where all are to get the same bits.

    Raises:
        EvaluationError: `hessian` and no text, or a text that nobody reads.
    """
    if (mode == "hessian") != bool(texts):
        raise EvaluationError(
            "--mode hessian needs --calibration FILE"
            if mode == "hessian"
            else f"--calibration is read by --mode hessian alone, not by {mode}; leave it out"
        )
    if mode == "uniform":
        return None
    if mode == "mse":
        return dict.fromkeys(weights, 1.0)
    return error_costs(*_model_and_windows(checkpoint, texts))


def unpack(packed: Path, output: Path) -> None:
    """Writes a checkpoint of the tensors of a packed directory, in the dtypes that they had.

    Raises:
        EvaluationError, CodecError: a file is missing or damaged, or the output is there already.
    """
    container = verified(packed)
    with new_directory(output) as partial:
        tensors = {name: container.read(name) for name in container.names()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        _copy(packed, partial)
        if (packed / "run.yaml").exists():
            save_file({}, partial / file_of("optimizer", 0, 1))
        write_checksums(partial)


def verified(packed: Path) -> Container:
    """The container of a packed directory, every file of which is as it was written.

    Raises:
        EvaluationError: one is not.
        CodecError: the container is damaged.
    """
    try:
        recorded = json.loads((packed / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{packed}: no packed checkpoint ({CHECKSUMS} cannot be read); pack it again") from error
    for file in packed.iterdir():
        if file.is_symlink() or not file.is_file():
            raise EvaluationError(f"{packed}: {file.name} is no plain file; copy the directory again")
    found = {file.name: file_sha256(file) for file in packed.iterdir() if file.name != CHECKSUMS}
    if found != recorded or WEIGHTS not in found:
        known = recorded if isinstance(recorded, dict) else {}
        differing = sorted(name for name in found.keys() | known.keys() if found.get(name) != known.get(name))
        raise EvaluationError(f"{packed}: missing, added or damaged: {', '.join(differing) or WEIGHTS}; copy it again")
    container = Container(packed / WEIGHTS)
    container.verify()
    return container


def inspection(container: Container) -> str:
    """What a container holds, as a table; reads headers alone."""
    rows, values, size = [], 0, 0
    for name in container.names():
        blob, nbytes = container.header(name), container.nbytes(name)
        values, size = values + blob.numel, size + nbytes
        coding = blob.stream + (f" {blob.depth} bit" if blob.depth else "") + (" rotated" if blob.rotated else "")
        shape, dtype = "x".join(map(str, blob.shape)), str(blob.dtype).removeprefix("torch.")
        rows.append((name, shape, dtype, coding, f"{nbytes:,}", f"{8 * nbytes / max(1, blob.numel):.3f}"))
    rows.append(("all", f"{values:,}", "", "", f"{size:,}", f"{8 * size / max(1, values):.3f}"))
    return markdown_table(("tensor", "shape", "dtype", "coding", "bytes", "bits a value"), rows)


def model_directory(path: Path) -> Path:
    """Of a run, its newest good checkpoint; a checkpoint of ours is verified."""
    if (path / "checkpoints").is_dir() or (path / CHECKSUMS).is_file() or not path.is_dir():
        return checkpoint_directory(path)
    return path


def weights_source(path: Path) -> Path:
    """What `Weights` reads of it: a file of safetensors itself, or see `model_directory`."""
    return path if path.is_file() else model_directory(path)


def _copy(source: Path, target: Path) -> None:
    """Copies configuration and tokenizer."""
    for file in sorted(source.iterdir()):
        about_weights = file.name.endswith(".index.json") or file.name == CHECKSUMS
        if file.is_file() and file.suffix in COPIED and not about_weights:
            shutil.copyfile(file, target / file.name)


def _model_and_windows(checkpoint: Path, texts: Sequence[str]) -> tuple[Model, list[Tensor]]:
    loaded = load_checkpoint(checkpoint)
    positions = loaded.model.config.max_position_embeddings
    return loaded.model, windows_of(loaded.tokenizer, read_texts(texts), positions)


def _run_pack(options: argparse.Namespace) -> None:
    coding = {"backend": options.backend, "transform": options.transform, "workers": options.workers}
    spent = {"mode": options.mode, "calibration": options.calibration}
    pack(options.checkpoint, options.output, options.bits, options.keep, **spent, **coding)


def _run_unpack(options: argparse.Namespace) -> None:
    unpack(options.packed, options.output)


def _run_inspect(options: argparse.Namespace) -> None:
    print(inspection(Container(options.packed / WEIGHTS if options.packed.is_dir() else options.packed)))


def _run_verify(options: argparse.Namespace) -> None:
    container = verified(options.packed)
    print(f"{options.packed}: {len(container.names())} tensors, all checksums hold")


def _run_compare(options: argparse.Namespace) -> None:
    source = weights_source(options.checkpoint)
    hessians = None
    if options.calibration:
        hessians = input_hessians(*_model_and_windows(source, options.calibration))
    rows = comparison(Weights(source), options.levels, options.backends, options.only, options.workers, hessians)
    print(comparison_table(rows))
    if any("output_rel_mse" in row for row in rows):
        print("\n" + comparison_table(rows, "output_rel_mse"))


def _run_rd(options: argparse.Namespace) -> None:
    weights = Weights(weights_source(options.checkpoint))
    if options.tensor not in weights:
        raise EvaluationError(f"{options.checkpoint}: no tensor {options.tensor!r}; it has {', '.join(weights)}")
    rows = rate_distortion(weights[options.tensor], options.bits, backend=options.backend, transform=options.transform)
    columns = ("bits", "side_bits", "rel_mse", "max_error")
    print(markdown_table(columns, [[f"{row[column]:.4g}" for column in columns] for row in rows]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.codec", description="Checkpoints through a tensor codec.")
    command = functools.partial(add_command, parser.add_subparsers(required=True, metavar="COMMAND"))

    def coding(made: Any) -> None:
        made.add_argument("--backend", choices=BACKENDS, default="x264", help="(default: %(default)s)")
        made.add_argument("--transform", choices=TRANSFORMS, default="none", help="(default: %(default)s)")

    made = command("pack", _run_pack, "Compresses a checkpoint.", "checkpoint", "output")
    made.add_argument("--bits", type=float, required=True, help="mean over all values, everything counted")
    made.add_argument("--keep", type=_pattern, metavar="REGEX", help="names of tensors that are kept exactly")
    made.add_argument("--mode", choices=MODES, default="uniform", help="who gets how many bits (default: %(default)s)")
    made.add_argument("--calibration", nargs="+", default=[], metavar="FILE", help="text for --mode hessian")
    coding(made)
    made.add_argument("--workers", type=positive, default=2, help="tensors at a time (%(default)s)")
    command("unpack", _run_unpack, "Restores a checkpoint.", "packed", "output")
    command("inspect", _run_inspect, "Lists what was packed.", "packed")
    command("verify", _run_verify, "Checks every checksum.", "packed")
    made = command("compare", _run_compare, "Errors at equal bits, against rounding.", "checkpoint")
    made.add_argument("--levels", type=positive, nargs="+", default=LEVELS, help="bits of rounding (%(default)s)")
    made.add_argument("--backends", choices=BACKENDS, nargs="+", default=["x264", "entropy"], help="(%(default)s)")
    made.add_argument("--only", type=_pattern, metavar="REGEX", help="names of tensors")
    made.add_argument("--calibration", nargs="+", default=[], metavar="FILE", help="text, for GPTQ and output errors")
    made.add_argument("--workers", type=positive, default=2, help="processes (%(default)s)")
    made = command("rd", _run_rd, "The curve of one tensor.", "checkpoint")
    made.add_argument("tensor")
    made.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.5, 3.0, 2.5, 2.0], help="(%(default)s)")
    coding(made)
    return parser


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from error


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
