"""Pretraining: one loop for the DLCM and its baseline, read from top to bottom in `pretrain`.

    python -m train.pretrain CONFIG.yaml [section.key=value ...]      starts a run, or continues it
    python -m train.pretrain --resume RUN_DIR                         continues a run
    torchrun --nproc-per-node N -m train.pretrain ...                 either, data-parallel

Whatever a step does is a function of (seed, step): its windows of text, its learning rate, its sharpening and its
boundary draws. So a run that was stopped and resumed is, bit for bit, the run that was not.
"""

import argparse
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.attention import AttentionBackendError
from dlcm.flops import forward_flops
from dlcm.mup import parameter_groups
from train.checkpoint import (
    CheckpointError,
    TrainingState,
    checkpoint_path,
    has_checkpoints,
    latest_checkpoint,
    load_state,
    restore_checkpoint,
    save_checkpoint,
)
from train.config import (
    ConfigError,
    RunConfig,
    build_model_config,
    config_differences,
    load_run_config,
    save_run_config,
)
from train.data import DataError, PackedLoader, TokenShards
from train.distributed import PeerFailure, Ranks
from train.evaluate import evaluate
from train.metrics import MetricsError, MetricsLog, Throughput, progress_bar, read_metrics, show_progress
from train.schedule import learning_rate_factor, sharpening
from train.step import Model, concept_metrics, forward_backward, mean_losses, training_flops, uses_bf16
from train.tokenizer import TokenizerError, load_tokenizer


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the last good checkpoint."""


# What a user can cause and mend: told in one line.
ERRORS = (
    *(ConfigError, DataError, TokenizerError, CheckpointError, MetricsError, TrainingError),
    *(AttentionBackendError, OSError),
)


def pretrain(run: RunConfig, checkpoint: Path | None, ranks: Ranks) -> int:
    """Trains from `checkpoint` (None: from scratch) to the last step.

    Returns:
        0, or the number of the signal that stopped the run, after a checkpoint.

    Raises:
        DataError, CheckpointError: data or checkpoint do not fit the run, or cannot be read or written.
        TrainingError: `max_bad_steps` in a row had no finite loss and gradient.
    """
    run_dir, device = Path(run.output), choose_device(run, ranks)
    if run.threads is not None:
        torch.set_num_threads(run.threads)

    shards = TokenShards(run.data.path, "train", run.data.verify)
    validation = TokenShards(run.data.path, "validation", run.data.verify)
    tokenizer = load_tokenizer(run.data.path)
    shards.check_tokenizer(tokenizer)
    loader = PackedLoader(
        shards,
        run.data.sequence_length,
        run.batch.rows,
        run.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        accumulation=run.batch.accumulation,
    )

    model = build_model(run, shards, tokenizer)
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    optimizer = build_optimizer(run, model)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    state = TrainingState(shards.fingerprint, shards.tokenizer_hash, ranks.size)
    if checkpoint is not None:
        check_continues(state, load_state(checkpoint), checkpoint)
        state = restore_checkpoint(checkpoint, model, optimizer)
    parallel = DistributedDataParallel(model) if ranks.size > 1 else model
    model.train()

    def save() -> int:
        save_checkpoint(run_dir, model, optimizer, tokenizer, run, state)
        return state.step

    ranks.on_first(lambda: record_run(run))
    if ranks.is_first:
        print_summary(run, model, loader, validation, state.step)
    throughput = Throughput()
    with (
        StopSignal(repeats=ranks.size > 1) as stop,
        MetricsLog(run_dir, state.step, active=ranks.is_first) as log,
        progress_bar(run.schedule.steps, state.step, shown=ranks.is_first) as bar,
    ):
        while state.step < run.schedule.steps:
            step = state.step  # counted from 0; metrics and checkpoints say how many steps are complete
            rate_factor = learning_rate_factor(step, run.schedule)
            for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = rate_factor * peak
            if isinstance(model, DLCMForCausalLM) and model.config.segmenter == "learned":
                model.set_sharpening(sharpening(step, model.config.sharpening, run.schedule))

            batches = [loader.batch(step, micro).to(device) for micro in range(run.batch.accumulation)]
            sums = forward_backward(run, parallel, batches, step, ranks)
            losses = mean_losses(sums, model, micro_batches=ranks.size * len(batches))
            grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm))

            # One non-finite number would spoil every parameter: such a step moves none, but is counted.
            if math.isfinite(losses["loss"]) and math.isfinite(grad_norm):
                optimizer.step()
                state.bad_in_a_row = 0
            else:
                state.skipped += 1
                state.bad_in_a_row += 1
            optimizer.zero_grad()
            state.step += 1
            state.tokens += int(sums.tokens)
            state.flops += training_flops(sums, model)
            throughput.add(int(sums.tokens))
            if state.bad_in_a_row >= run.max_bad_steps:
                raise TrainingError(
                    f"step {state.step}: loss or gradient not finite in {state.bad_in_a_row} steps in a row; the "
                    f"last good checkpoint, {checkpoint or 'none yet'}, is intact; lower optimizer.lr_token "
                    f"or look at the data"
                )

            is_last = state.step == run.schedule.steps
            if state.step == 1 or state.step % run.log_every == 0 or is_last:
                values = losses | {
                    **concept_metrics(sums, model),
                    "grad_norm": grad_norm,
                    "lr_factor": rate_factor,
                    "tokens": state.tokens,
                    "flops": state.flops,
                    "skipped": state.skipped,
                    "tokens_per_second": throughput.rate(),
                }
                log.write("train", state.step, values)
                show_progress(bar, values)
                throughput.restart()
            bar.update()

            if state.step % run.evaluation.every == 0 or is_last:
                values = evaluate(run, model, validation, ranks) | {"tokens": state.tokens}
                log.write("validation", state.step, values)
                if ranks.is_first:
                    bar.write(f"step {state.step}: validation {validation_line(values)}")
                throughput.restart()

            stopping = bool(ranks.max(int(stop.number > 0)))
            if state.step % run.checkpoint.every == 0 or is_last or stopping:
                checkpoint = checkpoint_path(run_dir, ranks.on_first(save))
                throughput.restart()
            if stopping and not is_last:
                if ranks.is_first:
                    bar.write(f"stopped after step {state.step}; continue: python -m train.pretrain --resume {run_dir}")
                return stop.number or signal.SIGTERM
    if ranks.is_first:
        print(f"finished {run_dir}: {checkpoint}")
    return 0


def build_model(run: RunConfig, shards: TokenShards, tokenizer: PreTrainedTokenizerFast) -> Model:
    """The model at its initialisation, which depends on the run's seed alone, on the CPU.

    Raises:
        DataError: the data have more token ids than the model's vocabulary.
    """
    config = build_model_config(run)
    if shards.vocab_size > config.vocab_size:
        raise DataError(
            f"{shards.path}: its tokenizer has {shards.vocab_size} ids, but model.vocab_size is "
            f"{config.vocab_size}; set it to {shards.vocab_size} or more"
        )
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(run.seed)
    return DLCMForCausalLM(config) if isinstance(config, DLCMConfig) else LlamaBaselineForCausalLM(config)


def build_optimizer(run: RunConfig, model: Model) -> torch.optim.AdamW:
    """AdamW with a group for each role that decoupled muP tells apart."""
    settings = run.optimizer
    groups = parameter_groups(
        model,
        model.config,
        lr_token=settings.lr_token,
        lr_concept=settings.lr_concept,
        lr_boundary=settings.lr_boundary,
        lr_other=settings.lr_other,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=model.device.type == "cuda")


def choose_device(run: RunConfig, ranks: Ranks) -> torch.device:
    """The CPU, or this rank's GPU.

    Raises:
        ConfigError: CUDA is asked for and not there.
    """
    available = torch.cuda.is_available()
    if run.device == "cuda" and not available:
        raise ConfigError("device is cuda, but torch sees no CUDA device; set device=cpu")
    if run.device == "cpu" or not available:
        return torch.device("cpu")
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def check_continues(fresh: TrainingState, saved: TrainingState, checkpoint: Path) -> None:
    """Raises CheckpointError where the run would not go on as it began: other data, tokenizer or ranks."""
    if saved.data_fingerprint != fresh.data_fingerprint or saved.tokenizer_hash != fresh.tokenizer_hash:
        raise CheckpointError(
            f"{checkpoint}: was trained on other data (fingerprint {saved.data_fingerprint[:12]}) than data.path "
            f"now holds ({fresh.data_fingerprint[:12]}); restore the data, or start a run with another output"
        )
    if saved.world_size != fresh.world_size:
        raise CheckpointError(
            f"{checkpoint}: was trained by {saved.world_size} processes, not {fresh.world_size}, so the steps "
            f"would not be the same; start as many as before"
        )


def open_run(arguments: argparse.Namespace, ranks: Ranks) -> tuple[RunConfig, int]:
    """The run that the command line means, and the step of the checkpoint it continues from (0: from scratch).

    Raises:
        ConfigError: a bad configuration, or a run directory that belongs to a run with another one.
        CheckpointError: nothing to resume, or no checkpoint is good.
    """
    if arguments.resume is None:
        run = load_run_config(arguments.config, arguments.overrides)
        run_dir = Path(run.output)
        ranks.on_first(lambda: check_run_directory(run))
        step = ranks.on_first(lambda: load_state(latest_checkpoint(run_dir)).step if has_checkpoints(run_dir) else 0)
    else:
        step = ranks.on_first(lambda: load_state(latest_checkpoint(arguments.resume)).step)
        run = load_run_config(checkpoint_path(arguments.resume, step) / "run.yaml")
        run.output = str(arguments.resume)  # it may have been moved
    return run, step


def check_run_directory(run: RunConfig) -> None:
    """Raises ConfigError where the run directory belongs to a run with another configuration.

    A run that ended before its first step, for lack of memory perhaps, has nothing to protect.
    """
    run_dir = Path(run.output)
    record = run_dir / "run.yaml"
    if not record.exists() or not (has_checkpoints(run_dir) or read_metrics(run_dir)):
        return
    differing = [key for key in config_differences(run, load_run_config(record)) if key != "output"]
    if differing:
        raise ConfigError(
            f"{run.output}: holds a run with other values of {', '.join(differing)}; choose another output, delete "
            f"that directory, or continue what is in it with --resume {run.output}"
        )


def record_run(run: RunConfig) -> None:
    """Writes the resolved configuration into the run directory, whole or not at all."""
    record = Path(run.output) / "run.yaml"
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(".tmp")
    save_run_config(run, partial)
    partial.replace(record)


class StopSignal:
    """While active, SIGINT and SIGTERM are noted in `number` and left to the loop, which ends its step first.

    A second signal acts at once, unless `repeats` says that the launcher sends each one twice, as torchrun does.
    """

    def __init__(self, repeats: bool):
        self.number = 0
        self._repeats = repeats

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if not self._repeats:
            os.write(2, b"\nstopping at the end of this step; once more stops at once\n")  # print may not be re-entered
            self.__exit__()


def validation_line(values: Mapping[str, float]) -> str:
    """What an evaluation found, for the terminal."""
    line = f"{values['bpb']:.4f} bits per byte"
    return f"{line}, {values['tokens_per_concept']:.2f} tokens per concept" if "tokens_per_concept" in values else line


def print_summary(run: RunConfig, model: Model, loader: PackedLoader, validation: TokenShards, step: int) -> None:
    """A few lines on what is about to happen."""
    steps, per_step = run.schedule.steps, loader.tokens_per_step
    flops = forward_flops(model.config, run.data.sequence_length).total
    precision = "bf16 autocast" if uses_bf16(run, model.device) else "fp32"
    print(f"run      {run.output}, {f'continued after step {step}' if step else 'from scratch'}")
    print(
        f"model    {run.model['architecture']}, {model.num_parameters() / 1e6:.2f} M parameters, "
        f"{flops / 1e6:,.2f} MFLOP per token forward"
    )
    print(
        f"data     {run.data.path}, {loader.shards.num_tokens:,} training and {validation.num_tokens:,} "
        f"validation tokens"
    )
    print(
        f"steps    {steps:,} of {per_step:,} tokens, {steps * per_step:,} in all "
        f"({steps * per_step / loader.shards.num_tokens:.2f} epochs)"
    )
    print(f"device   {model.device}, {precision}, {torch.get_num_threads()} CPU threads", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path, nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that win over the file's")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue the run in this directory")
    arguments = parser.parse_args(argv)
    if (arguments.config is None) == (arguments.resume is None):
        parser.error("give either a CONFIG (with overrides if you like) or --resume RUN_DIR alone")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 finished, 2 an error, 128 + N stopped by signal N."""
    arguments = parse_arguments(argv)
    transformers.logging.disable_progress_bar()  # of saving one file, in the middle of ours
    ranks = Ranks()
    try:
        run, step = open_run(arguments, ranks)
        checkpoint = checkpoint_path(Path(run.output), step) if step else None
        if step >= run.schedule.steps:
            print(f"{run.output} is finished: {checkpoint}")
            return 0
        number = pretrain(run, checkpoint, ranks)
        return 128 + number if number else 0
    except PeerFailure:
        return 2
    except ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted at once; what was saved before is intact", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        ranks.leave()


if __name__ == "__main__":
    sys.exit(main())
