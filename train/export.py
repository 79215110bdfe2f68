"""What was trained, as a plain directory of transformers, without optimizer and run.

    python -m train.export CHECKPOINT OUTPUT [--dtype bf16]

    import dlcm  # registers both architectures
    model = transformers.AutoModelForCausalLM.from_pretrained(OUTPUT)

CHECKPOINT is a checkpoint directory, or a run, of which the newest good checkpoint is taken. OUTPUT is weights and
config of the model, and the tokenizer; `python -m train.pretrain CONFIG init_from=OUTPUT` starts a run from them.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from train.checkpoint import CheckpointError, checkpoint_directory, load_model
from train.config import ConfigError
from train.tokenizer import TokenizerError, load_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ERRORS = (CheckpointError, ConfigError, TokenizerError, OSError)


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A new directory under another name, which becomes `output` if nothing goes wrong.

    Raises:
        ConfigError: `output` exists.
        CheckpointError: the disk refused.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists; give another name, or delete it")
    partial = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output}: could not be written ({error}); make room, or choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something went wrong


def export(checkpoint: Path, output: Path, dtype: torch.dtype) -> Path:
    """Writes the model of a checkpoint, or of a run's newest, to `output`, whole or not at all.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged, or the disk refused.
        ConfigError: `output` exists.
    """
    directory = checkpoint_directory(checkpoint)
    with new_directory(output) as partial:
        model = load_model(directory).to(dtype)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        model.save_pretrained(partial)
        load_tokenizer(str(directory)).save_pretrained(partial)
    return directory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m train.export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint directory, or a run directory")
    parser.add_argument("output", type=Path, help="a directory, which is made")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (fp32)")
    arguments = parser.parse_args(argv)
    transformers.logging.disable_progress_bar()
    try:
        directory = export(arguments.checkpoint, arguments.output, DTYPES[arguments.dtype])
    except ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: the weights of {directory}, in {arguments.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
