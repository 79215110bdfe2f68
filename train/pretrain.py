"""Pretraining: one loop for the DLCM and its baseline, read from top to bottom in `pretrain`.

    python -m train.pretrain CONFIG.yaml [section.key=value ...]      starts a run, or continues it
    python -m train.pretrain --resume RUN_DIR [section.key=value ...] continues a run, as it was or changed
    torchrun --nproc-per-node N -m train.pretrain ...                 either, data-parallel (see `train.parallel`)

Whatever a step does is a function of (seed, step): its windows of text, its learning rate, its sharpening and its
boundary draws. So a run that was stopped and resumed unchanged is the run that was not: bit for bit on the CPU without
`compile`; otherwise but for the order in which attention and compiled reductions sum. A resumed run may change
everything but `model` and `output`; with another seed or batch, steps to come are those of the new values. On another
number of processes it goes on with the same windows, `batch.accumulation` making up for the number, and with the same
boundary draws where `batch.rows` is kept: the same but for the order of sums.
"""

import argparse
import functools
import math
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.attention import AttentionBackendError
from dlcm.blocks import recompute_blocks_
from dlcm.compilation import CompilationError, compile_blocks_
from dlcm.config import changed
from dlcm.flops import forward_flops
from dlcm.mup import parameter_groups
from train.checkpoint import (
    CHECKSUMS,
    FLOATS,
    CheckpointError,
    TrainingState,
    check_model,
    checkpoint_path,
    checkpoint_step,
    config_changes,
    half_written,
    has_checkpoints,
    latest_checkpoint,
    load_model_config,
    load_state,
    load_weights,
    model_without_memory,
    restore_checkpoint,
    verify_checkpoint,
)
from train.compression import (
    BitPenalty,
    NothingLeft,
    fit_quantisers_,
    is_of_quantiser,
    quantiser_groups,
    remove_dead_channels_,
)
from train.config import (
    ConfigError,
    RunConfig,
    build_model_config,
    config_differences,
    load_run_config,
    save_run_config,
)
from train.data import DataError, Mixture, PackedLoader, TokenShards
from train.distributed import PeerFailure, Ranks, means_lost_rank
from train.environment import record_start
from train.evaluate import evaluate
from train.metrics import MetricsError, MetricsLog, Throughput, progress_bar, read_metrics, show_progress
from train.parallel import check_parallel, distribute, rewrapped
from train.saving import CheckpointSaver
from train.schedule import learning_rate_factor, sharpening, target_ratio
from train.signals import StopRequests
from train.spikes import SpikeRule
from train.step import (
    STOPS,
    Model,
    StepNumbers,
    UnreadNumbers,
    collector_whole_afterwards,
    concept_metrics,
    forward_backward,
    mean_losses,
    model_flops,
    over_ranks,
    spare_the_collector,
    training_flops,
    update_parameters,
    uses_bf16,
)
from train.tokenizer import TokenizerError, load_tokenizer, tokenizer_hash, word_end_ids
from train.utilisation import UtilisationError, datasheet_peak, measured_peak, utilisation

WARM_UP_STEPS = 3  # after which a training step compiles nothing more


class TrainingError(RuntimeError):
    """A run that cannot go on; the message names the last good checkpoint."""


# What a user can cause and mend: told in one line.
ERRORS = (
    *(ConfigError, DataError, TokenizerError, CheckpointError, MetricsError, TrainingError, UtilisationError),
    *(AttentionBackendError, CompilationError, OSError),
)


def pretrain(run: RunConfig, checkpoint: Path | None, ranks: Ranks) -> int:
    """Trains from `checkpoint` (None: from scratch) to the last step.

    Returns:
        0, or the number of the signal that stopped the run, after a checkpoint.

    Raises:
        DataError, CheckpointError: data or checkpoint do not fit the run, or cannot be read or written.
        ConfigError: no such device, or ranks that cannot be grouped as `parallel` asks.
        CompilationError: `compile` is asked for and cannot work here.
        TrainingError: `max_bad_steps` in a row were skipped, or there were too many spikes.
    """
    ranks.on_first(lambda: check_parallel(run.parallel, ranks))
    run_dir, device = Path(run.output), choose_device(run, ranks)
    if run.threads is not None:
        torch.set_num_threads(run.threads)

    training, validation = open_shards(run, ranks)
    tokenizer = load_tokenizer(str(training.path))
    training.check_tokenizer(tokenizer)
    loader = PackedLoader(
        training,
        run.data.sequence_length,
        run.batch.rows,
        run.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        accumulation=run.batch.accumulation,
    )

    state = TrainingState(training.fingerprint, training.tokenizer_hash, ranks.size)
    model_config = final_model_config(run, training, tokenizer)
    if checkpoint is not None:
        ranks.on_first(functools.partial(check_continues, run, state, load_state(checkpoint), checkpoint))
        ranks.on_first(functools.partial(check_model, checkpoint, model_config))
    elif run.init_from is not None:
        ranks.on_first(lambda: check_initial_weights(run, model_config, training))
    channels_left = None if checkpoint is None else load_model_config(checkpoint).channels_left
    model = build_model(run, training, tokenizer, channels_left)
    if checkpoint is None and run.init_from is not None:
        load_initial_weights(run, model)
    parallel = distribute(model, run.parallel, device, ranks, uses_bf16(run, device))
    optimizer = build_optimizer(run, model)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    if checkpoint is not None:
        state = restore_checkpoint(checkpoint, model, optimizer)
        state.world_size = ranks.size
    recompute_blocks_(model, run.activation_checkpointing == "full")
    if run.compile:
        compile_blocks_(model)
    peak_flops = measured_peak(device) if run.mfu == "measured" else datasheet_peak(device)
    model.train()

    def account(numbers: StepNumbers) -> None:
        state.flops += training_flops(numbers.sums, model, run.batch)
        state.skipped += numbers.skipped
        state.bad_in_a_row = state.bad_in_a_row + 1 if numbers.skipped else 0
        state.spikes += numbers.spike
        state.recent_spikes = state.recent_spikes * (1 - 1 / run.spikes.window) + numbers.spike
        if numbers.spike and ranks.is_first:
            bar.write(f"step {numbers.step}: skipped as a spike, its gradient's norm is {numbers.grad_norm:.4g}")
        problem = too_many_skipped(run, state)
        if problem is not None:
            saver.wait()  # for the checkpoint that is named
            raise TrainingError(f"step {numbers.step}: {problem}; {remedy(run, checkpoint)}, or look at the data")

    penalty = BitPenalty(run, model, state) if run.compression.method == "learned" else None
    spikes = SpikeRule(run.spikes, state, device) if run.spikes.deviations is not None else None
    ranks.on_first(lambda: record_run(run))
    ranks.on_first(lambda: record_start(run, state.step, ranks.size, device))
    if ranks.is_first:
        print_summary(run, model, loader, validation, state.step)
    throughput = Throughput()
    with (
        StopSignal(repeats=ranks.size > 1) as stop,
        CheckpointSaver(run, model, optimizer, tokenizer, ranks) as saver,
        MetricsLog(run_dir, state.step, active=ranks.is_first) as log,
        progress_bar(run.schedule.steps, state.step, shown=ranks.is_first) as bar,
        collector_whole_afterwards(),
    ):

        def validate() -> None:
            values = evaluate(run, model, validation, ranks) | {"tokens": state.tokens}
            log.write("validation", state.step, values)
            if ranks.is_first:
                bar.write(f"step {state.step}: validation {validation_line(values)}")
            throughput.restart()

        if ranks.on_first(lambda: lacks_evaluation(run, state.step)):
            validate()
        unread: deque[UnreadNumbers] = deque()
        stopping = False
        warm = state.step + WARM_UP_STEPS
        while state.step < run.schedule.steps:
            step = state.step  # counted from 0; metrics and checkpoints say how many steps are complete
            rate_factor = learning_rate_factor(step, run.schedule)
            for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = rate_factor * peak
            if isinstance(model, DLCMForCausalLM) and model.config.segmenter == "learned":
                model.set_sharpening(sharpening(step, model.config.sharpening, run.schedule))
            if isinstance(model, DLCMForCausalLM):
                model.target_ratio = target_ratio(step, model.config.target_ratio, run.schedule)

            batches = [loader.batch(step, micro).to(device) for micro in range(run.batch.accumulation)]
            sums = forward_backward(run, parallel, batches, step, ranks)
            asked_to_stop = stop.number > 0 or saver.failed  # then the next save of all ranks says so
            sums[STOPS].fill_(asked_to_stop)
            sums = over_ranks(sums, ranks)
            if penalty is not None:
                penalty.press_(step)
            outcome = update_parameters(optimizer, sums, run.optimizer.clip_norm, spikes)
            if penalty is not None:
                penalty.project_()
            state.step += 1
            if state.step == warm:
                spare_the_collector()
            state.tokens += loader.tokens_per_step
            throughput.add(loader.tokens_per_step)

            is_last = state.step == run.schedule.steps
            logs = state.step == 1 or state.step % run.log_every == 0 or is_last
            saves = state.step % run.checkpoint.every == 0 or is_last
            evaluates = evaluation_due(run, state.step)
            removes = removal_due(run, state.step)
            # Numbers are read a step late, when the device has other work to go on with, unless they are needed now.
            needed = logs or saves or evaluates or removes or (asked_to_stop and ranks.size == 1)
            unread.append(UnreadNumbers(state.step, sums, outcome))
            while len(unread) > (0 if needed or stopping else 1):
                numbers = unread.popleft().read()
                account(numbers)
                stopping = stopping or numbers.sums.stops > 0  # the same step on every rank
            if logs:
                values = {
                    **mean_losses(numbers.sums, model),
                    **concept_metrics(numbers.sums, model),
                    "grad_norm": numbers.grad_norm,
                    "lr_factor": rate_factor,
                    "tokens": state.tokens,
                    "flops": state.flops,
                    "skipped": state.skipped,
                    **({"spikes": state.spikes} if spikes is not None else {}),
                    **(penalty.metrics() if penalty is not None else {}),
                    "tokens_per_second": (rate := throughput.rate()),
                }
                if peak_flops is not None and state.step > warm:  # before, seconds went into compilation
                    needed_flops = model_flops(numbers.sums, model) / numbers.sums.tokens
                    values["mfu"] = utilisation(rate * needed_flops, peak_flops * ranks.size)
                log.write("train", state.step, values)
                show_progress(bar, values)
                throughput.restart()
            bar.update()

            if removes and penalty is not None:
                penalty.write_to(state)
                if remove(run, model, optimizer, state.step, checkpoint):
                    parallel = rewrapped(parallel)
                    if run.compile:
                        compile_blocks_(model)
                    peak_rates = [group["lr"] for group in optimizer.param_groups]
                    penalty = BitPenalty(run, model, state)
                    warm = state.step + WARM_UP_STEPS
                    throughput.restart()
            if saves or stopping:
                if spikes is not None:
                    spikes.write_to(state)
                if penalty is not None:
                    penalty.write_to(state)
                checkpoint = saver.save(state)
                throughput.restart()
            if stopping and not is_last:
                saver.wait()
                if ranks.is_first:
                    bar.write(f"stopped after step {state.step}; continue: python -m train.pretrain --resume {run_dir}")
                return stop.number or signal.SIGTERM
            # After the checkpoint, which nothing that fails here can cost; a resumed run makes up for it.
            if evaluates:
                validate()
        saver.wait()
    if ranks.is_first:
        print(f"finished {run_dir}: {checkpoint}")
    return 0


def open_shards(run: RunConfig, ranks: Ranks) -> tuple[Mixture, Mixture]:
    """The training and validation splits. The first rank verifies them for all: hashing reads every byte."""
    splits, sources = ("train", "validation"), run.data.sources()

    def verify() -> None:
        for split in splits:
            Mixture.open(sources, split, run.data.verify)

    ranks.on_first(verify)
    training, validation = (Mixture.open(sources, split, verify=False) for split in splits)
    return training, validation


def evaluation_due(run: RunConfig, step: int) -> bool:
    """Whether the model of `step` completed steps is to be evaluated."""
    return step > 0 and (step % run.evaluation.every == 0 or step == run.schedule.steps)


def lacks_evaluation(run: RunConfig, step: int) -> bool:
    """Whether the run ended between the checkpoint of `step` and its evaluation."""
    if not evaluation_due(run, step):
        return False
    recorded = {line["step"] for line in read_metrics(Path(run.output)) if line["kind"] == "validation"}
    return step not in recorded


def removal_due(run: RunConfig, step: int) -> bool:
    """Whether dead channels leave the model of `step` completed steps."""
    return run.compression.remove_every is not None and step % run.compression.remove_every == 0


def remove(run: RunConfig, model: Model, optimizer: torch.optim.AdamW, step: int, checkpoint: Path | None) -> bool:
    """Takes dead channels out of model and optimizer; says whether there were any.

    Raises:
        TrainingError: there are no others.
    """
    try:
        return remove_dead_channels_(model, optimizer, functools.partial(optimizer_groups, run, model))
    except NothingLeft as error:
        way = "set a higher compression.target_bits, or a lower compression.gamma"
        if checkpoint is None:
            way = f"there is no checkpoint yet: delete {run.output}, and {way}"
        else:
            way = f"the last good checkpoint, {checkpoint}, is intact: go on from it, --resume {run.output}, but {way}"
        raise TrainingError(f"step {step}: no weight of any block has bits left; {way}") from error


def too_many_skipped(run: RunConfig, state: TrainingState) -> str | None:
    """Why a run has to stop, if so many of its last steps moved nothing that it is on no good way."""
    if state.bad_in_a_row >= run.max_bad_steps:
        spike = ", or a spike," if run.spikes.deviations is not None else ""
        return f"loss or gradient not finite{spike} in {state.bad_in_a_row} steps in a row"
    if state.recent_spikes > run.spikes.most:
        return f"more than {run.spikes.most} spikes in about {run.spikes.window} steps"
    return None


def remedy(run: RunConfig, checkpoint: Path | None) -> str:
    """What may help a run whose steps are no longer good ones."""
    if checkpoint is None:
        return f"there is no checkpoint yet: delete {run.output} and start again with a lower optimizer.lr_token"
    return (
        f"the last good checkpoint, {checkpoint}, is intact: go on from it with a lower learning rate, "
        f"--resume {run.output} optimizer.lr_token={run.optimizer.lr_token / 2:g}"
    )


def final_model_config(
    run: RunConfig, shards: TokenShards | Mixture, tokenizer: PreTrainedTokenizerFast
) -> DLCMConfig | LlamaBaselineConfig:
    """The run's model config, with what the tokenizer decides.

    Raises:
        DataError: the data have more token ids than the model's vocabulary.
        TokenizerError: words are asked for, and it does not say what bytes its tokens stand for.
    """
    config = build_model_config(run)
    if shards.vocab_size > config.vocab_size:
        raise DataError(
            f"{shards.path}: its tokenizer has {shards.vocab_size} ids, but model.vocab_size is "
            f"{config.vocab_size}; set it to {shards.vocab_size} or more"
        )
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    if isinstance(config, DLCMConfig) and config.segmenter == "words":
        config.word_end_ids = word_end_ids(tokenizer)
    return config


def build_model(
    run: RunConfig,
    shards: TokenShards | Mixture,
    tokenizer: PreTrainedTokenizerFast,
    channels_left: dict[str, list[int]] | None = None,
) -> Model:
    """The model at its initialisation, which depends on the run's seed alone, on the CPU.

    Args:
        channels_left: by removal, where the run goes on; None: it has removed nothing.

    Raises:
        DataError, TokenizerError: see `final_model_config`.
    """
    config = changed(final_model_config(run, shards, tokenizer), {"channels_left": channels_left})
    torch.manual_seed(run.seed)
    model = DLCMForCausalLM(config) if isinstance(config, DLCMConfig) else LlamaBaselineForCausalLM(config)
    fit_quantisers_(run, model)
    return model


def check_initial_weights(run: RunConfig, config: DLCMConfig | LlamaBaselineConfig, shards: Mixture) -> None:
    """Says where the model is not that of `init_from`, whose tensors must be this model's; allocates nothing.

    Raises:
        ConfigError: there are no weights there, or they are of another model or tokenizer; names the remedy.
        CheckpointError: they are damaged.
    """
    directory = Path(run.init_from or "")
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"init_from: {directory} has no config.json; give a checkpoint (RUN_DIR/checkpoints/step_...) or a "
            f"directory that train.export wrote"
        )
    if (directory / CHECKSUMS).exists():
        verify_checkpoint(directory)
    saved = load_model_config(directory)
    if saved.channels_left is not None:
        raise ConfigError(
            f"init_from: {directory} lost channels to compression.remove_every, and only its own run goes on without; "
            f"begin with what eval.selfcompress export and unpack make of it, which has zeros in their places"
        )
    changes = config_changes(saved, config)
    words = [f"model.{name} from {old} to {new}" for name, (old, new) in changes.items()]
    if "quantiser" in changes and changes["quantiser"][0] == "none":  # what rounds may begin with plain weights
        config = changed(config, {"quantiser": "none"})
    try:
        model_without_memory(directory, config, FLOATS)
    except CheckpointError as error:
        if not changes:
            raise
        raise ConfigError(
            f"init_from: {directory} does not fit a model that changes {', '.join(words)}; set `model` as it was there"
        ) from error
    if tokenizer_hash(load_tokenizer(str(directory))) != shards.tokenizer_hash:
        raise ConfigError(
            f"init_from: {directory} has another tokenizer than {shards.path}; prepare the text with "
            f"--tokenizer {directory}"
        )
    for change in words:
        print(f"changed  {change}")


def load_initial_weights(run: RunConfig, model: Model) -> None:
    """Fills the model with the weights of `init_from`; to plain ones, bit depths and exponents are fitted."""
    directory = Path(run.init_from or "")
    if load_model_config(directory).quantiser == "none":
        load_weights(directory, model, FLOATS, without=is_of_quantiser)
        fit_quantisers_(run, model)
    else:
        load_weights(directory, model, FLOATS)


def build_optimizer(run: RunConfig, model: Model) -> torch.optim.AdamW:
    """AdamW with a group for each role that decoupled muP tells apart, and others for bit depths and exponents."""
    betas = run.optimizer.beta1, run.optimizer.beta2
    return torch.optim.AdamW(optimizer_groups(run, model), betas=betas, fused=True)


def optimizer_groups(run: RunConfig, model: Model) -> list[dict[str, Any]]:
    """Of its parameters as they are."""
    settings = run.optimizer
    groups = parameter_groups(
        ((name, parameter) for name, parameter in model.named_parameters() if not is_of_quantiser(name)),
        model.config,
        lr_token=settings.lr_token,
        lr_concept=settings.lr_concept,
        lr_boundary=settings.lr_boundary,
        lr_other=settings.lr_other,
        lr_embedding=settings.lr_embedding,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    return groups + quantiser_groups(run, model)


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


def check_continues(run: RunConfig, fresh: TrainingState, saved: TrainingState, checkpoint: Path) -> None:
    """Raises CheckpointError where the run would not go on as it began: on other data or another tokenizer, or on
    another number of processes whose steps are not as large.
    """
    if saved.data_fingerprint != fresh.data_fingerprint or saved.tokenizer_hash != fresh.tokenizer_hash:
        raise CheckpointError(
            f"{checkpoint}: was trained on other data (fingerprint {saved.data_fingerprint[:12]}) than "
            f"its data section now names ({fresh.data_fingerprint[:12]}); restore the data, or start a run with "
            "another output"
        )
    if saved.world_size == fresh.world_size:
        return  # a batch that changes is meant to
    before, batch = load_run_config(checkpoint / "run.yaml").batch, run.batch
    windows = before.rows * before.accumulation * saved.world_size
    if batch.rows * batch.accumulation * fresh.world_size != windows:
        each, rest = divmod(windows, fresh.world_size)
        rows = math.gcd(each, before.rows)
        fitting = f"set batch.rows={rows} batch.accumulation={each // rows}, or start as many as before"
        raise CheckpointError(
            f"{checkpoint}: {saved.world_size} processes trained it on {windows} windows a step, which "
            f"{fresh.world_size} with batch.rows={batch.rows} batch.accumulation={batch.accumulation} do not make; "
            f"{f'start a number of processes that divides {windows}' if rest else fitting}"
        )


def open_run(arguments: argparse.Namespace, ranks: Ranks) -> tuple[RunConfig, Path | None]:
    """The run that the command line means, and the checkpoint it continues from (None: from scratch).

    Raises:
        ConfigError: a bad configuration, a run directory that belongs to a run with another one, or a change that
            a resumed run cannot make.
        CheckpointError: nothing to resume, or no checkpoint is good.
    """
    if arguments.resume is None:
        run = load_run_config(arguments.config, arguments.overrides)
        run_dir = Path(run.output)
        ranks.on_first(lambda: check_run_directory(run))
        step = ranks.on_first(lambda: step_to_continue(run_dir))
        return run, checkpoint_path(run_dir, step) if step else None
    run_dir = arguments.resume
    checkpoint = checkpoint_path(run_dir, ranks.on_first(lambda: checkpoint_step(latest_checkpoint(run_dir))))
    # The run's own record knows of changes made since the checkpoint; checkpoints alone will do, though.
    record = run_dir / "run.yaml" if (run_dir / "run.yaml").exists() else checkpoint / "run.yaml"
    before = run = load_run_config(record, resolved=True)
    if arguments.overrides:
        run = load_run_config(record, arguments.overrides, resolved=True)
    changes = config_differences(before, run)
    for key, (old, new) in changes.items():
        if key in ("output", "init_from") or key.startswith("model."):
            raise ConfigError(
                f"command line: {key} cannot change from {old} to {new} in a resumed run; start a run with its "
                f"config file and another output"
            )
    if ranks.is_first:
        for key, (old, new) in changes.items():
            print(f"changed  {key} from {old} to {new}")
    run.output = str(run_dir)  # it may have been moved
    return run, checkpoint


def step_to_continue(run_dir: Path) -> int:
    """The step of the newest good checkpoint; 0 where none was ever written to its end."""
    if has_checkpoints(run_dir):
        return checkpoint_step(latest_checkpoint(run_dir))
    for partial in half_written(run_dir)[:1]:
        print(f"warning: {partial}: is half-written, and no other checkpoint is here; from scratch", file=sys.stderr)
    return 0


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


class StopSignal(StopRequests):
    """Stops are left to the loop, which ends its step first.

    A second signal acts at once, unless `repeats` says that the launcher sends each one twice, as torchrun does.
    """

    def __init__(self, repeats: bool):
        super().__init__()
        self._repeats = repeats

    def react(self, number: int) -> None:
        if not self._repeats:
            os.write(2, b"\nstopping at the end of this step; once more stops at once\n")  # print may not be re-entered
            self.__exit__()


def validation_line(values: Mapping[str, float]) -> str:
    """What an evaluation found, for the terminal."""
    line = f"{values['bpb']:.4f} bits per byte"
    return f"{line}, {values['tokens_per_concept']:.2f} tokens per concept" if "tokens_per_concept" in values else line


def data_lines(loader: PackedLoader, validation: Mixture, steps: int) -> list[str]:
    """What each source gives to the run, and how often it is read."""
    mixture, lines = loader.mixture, []
    sources = zip(mixture.names, mixture.shards, validation.shards, mixture.shares, loader.epochs(steps), strict=True)
    for name, training, held_out, share, epochs in sources:
        line = f"{training.path}, {training.num_tokens:,} training and {held_out.num_tokens:,} validation tokens"
        often = f"{epochs:.2f} epochs{', so its text is repeated' if epochs > 1 else ''}"
        lines.append(f"{name}: {100 * share:.4g} %, {line}, {often}" if name else f"{line}, {often}")
    if not mixture.bytes_are_exact:
        lines.append("bits per byte are approximate: this tokenizer's tokens stand for no exact number of bytes")
    return [f"{'' if index else 'data':9}{line}" for index, line in enumerate(lines)]


def print_summary(run: RunConfig, model: Model, loader: PackedLoader, validation: Mixture, step: int) -> None:
    """A few lines on what is about to happen."""
    steps, per_step = run.schedule.steps, loader.tokens_per_step
    flops = forward_flops(model.config, run.data.sequence_length).total
    precision = "bf16 autocast" if uses_bf16(run, model.device) else "fp32"
    beginning = "from scratch" if run.init_from is None else f"from the weights of {run.init_from}"
    print(f"run      {run.output}, {f'continued after step {step}' if step else beginning}")
    print(
        f"model    {run.model['architecture']}, {model.num_parameters() / 1e6:.2f} M parameters, "
        f"{flops / 1e6:,.2f} MFLOP per token forward"
    )
    print("\n".join(data_lines(loader, validation, steps)))
    print(f"steps    {steps:,} of {per_step:,} tokens, {steps * per_step:,} in all")
    compiled = ", compiled in the first steps" if model.compiled else ""
    print(f"device   {model.device}, {precision}{compiled}, {torch.get_num_threads()} CPU threads", flush=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys that win over the run's")
    parser.add_argument("--resume", type=Path, metavar="RUN_DIR", help="continue the run in this directory")
    arguments = parser.parse_args(argv)
    if arguments.resume is not None and "=" in (arguments.config or ""):
        # argparse takes the first word for the config; with --resume it is an override.
        arguments.overrides.insert(0, arguments.config)
        arguments.config = None
    if (arguments.config is None) == (arguments.resume is None):
        parser.error("give either a CONFIG or --resume RUN_DIR, with overrides if you like")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 finished, 2 an error, 128 + N stopped by signal N."""
    arguments = parse_arguments(argv)
    transformers.logging.disable_progress_bar()  # of saving one file, in the middle of ours
    ranks = Ranks()
    try:
        run, checkpoint = open_run(arguments, ranks)
        step = checkpoint_step(checkpoint) if checkpoint else 0
        if step >= run.schedule.steps and not ranks.on_first(lambda: lacks_evaluation(run, step)):
            print(f"{run.output} is finished: {checkpoint}")
            return 0
        number = pretrain(run, checkpoint, ranks)
        return 128 + number if number else 0
    except PeerFailure:
        return 2
    except ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not means_lost_rank(error):
            raise
        said = " ".join(str(error).split())
        message = f"error: rank {ranks.rank} lost another, which ended or hung ({said}); see what that one said, then"
        print(f"{message} continue with --resume RUN_DIR", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted at once; what was saved before is intact", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        ranks.leave()


if __name__ == "__main__":
    sys.exit(main())
