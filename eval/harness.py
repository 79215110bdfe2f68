"""The adapter to lm-eval: a model or a checkpoint as an `lm_eval.api.model.LM`, so that any of its tasks can be run.

    from eval.harness import HarnessModel
    lm_eval.simple_evaluate(model=HarnessModel.from_checkpoint("runs/mine/dlcm"), tasks=["piqa"])

Likelihoods are `eval.scoring`'s, and text is generated with the cache. lm-eval's own `--model hf` takes a checkpoint
directory, too, once the architectures are registered, and gives the same numbers, if it is told to open texts as they
were in training (not for rolling likelihoods, where it would score bos itself):

    python -c "import dlcm; from lm_eval.__main__ import cli_evaluate as main; main()" \\
        --model hf --model_args pretrained=CHECKPOINT,add_bos_token=True --tasks piqa

Needs lm-eval: `pip install dlcm[benchmarks]`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteriaList

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from eval.loading import EvaluationError, decode, load_checkpoint
from eval.scoring import BATCH_ROWS, Dtype, Scorer, progress_bar


class HarnessModel(LM):
    """A model as lm-eval asks it.

    Args:
        model, tokenizer, dtype: see `Scorer`.
        batch_size: rows that are read, or go on, at a time.
    """

    def __init__(
        self,
        model: DLCMForCausalLM | LlamaBaselineForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int = BATCH_ROWS,
        dtype: Dtype = "float32",
    ):
        super().__init__()
        self.scorer = Scorer(model, tokenizer, dtype, batch_rows=batch_size)
        self.tokenizer, self.batch_size = tokenizer, batch_size

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, batch_size: int = BATCH_ROWS, dtype: Dtype = "float32"
    ) -> "HarnessModel":
        loaded = load_checkpoint(Path(path))
        return cls(loaded.model, loaded.tokenizer, batch_size, dtype)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        scores = self.scorer.score(self.scorer.pairs([request.args for request in requests]), "loglikelihood")
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        texts = [text for (text,) in (request.args for request in requests)]
        scores = self.scorer.score(self.scorer.documents(texts), "loglikelihood_rolling")
        return [score.log_likelihood for score in scores]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations, up to the first stop string, eos, or `max_gen_toks`.

        Raises:
            EvaluationError: `max_gen_toks` leaves no position for a context.
        """
        alike: dict[str, list[int]] = {}  # requests with the same options, which go on together
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found: dict[int, str] = {}
        with progress_bar(len(requests), "generate_until", "request") as progress:
            for indices in alike.values():
                going_on = _Generation.of(requests[indices[0]].args[1], self.scorer)
                beginnings = self.scorer.beginnings([requests[index].args[0] for index in indices])
                by_length = sorted(zip(indices, beginnings, strict=True), key=lambda pair: -len(pair[1]))
                for start in range(0, len(by_length), self.batch_size):
                    batch = dict(by_length[start : start + self.batch_size])
                    found |= zip(batch, going_on(list(batch.values())), strict=True)
                    progress.update(len(batch))
        return [found[index] for index in range(len(requests))]


@dataclass(frozen=True, slots=True)
class _Generation:
    """How texts go on: as `generate` understands it, and up to which strings."""

    scorer: Scorer
    config: GenerationConfig
    until: list[str]

    @classmethod
    def of(cls, options: dict[str, Any], scorer: Scorer) -> "_Generation":
        """From a request's options, which may be any of `GenerationConfig`'s."""
        options = dict(normalize_gen_kwargs(options))
        until, new_tokens = options.pop("until"), options.pop("max_gen_toks")
        if not 1 <= new_tokens < scorer.positions:
            raise EvaluationError(
                f"max_gen_toks={new_tokens} must be at least 1 and leave a position for the context, the model has "
                f"{scorer.positions}; set it in the task's generation_kwargs"
            )
        if not options["do_sample"]:
            options.pop("temperature", None)
        eos = scorer.tokenizer.eos_token_id
        pad = 0 if eos is None else eos
        return cls(
            scorer, GenerationConfig(max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=pad, **options), until
        )

    def __call__(self, beginnings: Sequence[np.ndarray]) -> list[str]:
        """What comes after each beginning, which is cut on the left to leave room for it."""
        room = self.scorer.positions - self.config.max_new_tokens
        kept = [torch.from_numpy(ids_T[-room:]) for ids_T in beginnings]
        columns, device = max(map(len, kept)), self.scorer.model.device
        ids_BL = torch.full((len(kept), columns), self.config.pad_token_id)
        mask_BL = torch.zeros_like(ids_BL)
        for row, ids_T in enumerate(kept):
            ids_BL[row, columns - len(ids_T) :], mask_BL[row, columns - len(ids_T) :] = ids_T, 1
        with self.scorer.autocast():
            written_BL: Any = self.scorer.model.generate(  # type: ignore[misc]  # it names a protocol no model meets
                ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                stopping_criteria=StoppingCriteriaList([self._has_stopped(columns)] if self.until else []),
                generation_config=self.config,
            )
        return [self._before_stop(decode(self.scorer.tokenizer, ids_T)) for ids_T in written_BL[:, columns:].cpu()]

    def _has_stopped(self, columns: int) -> Callable[..., Tensor]:
        """Of each row, whether there is a stop string behind so many columns."""

        def has_stopped(input_ids_BL: Tensor, scores: Any, **_: Any) -> Tensor:
            texts = [decode(self.scorer.tokenizer, ids_T) for ids_T in input_ids_BL[:, columns:].cpu()]
            stopped = [self._before_stop(text) != text for text in texts]
            return torch.tensor(stopped, device=input_ids_BL.device)

        return has_stopped

    def _before_stop(self, text: str) -> str:
        return min((text.split(stop, 1)[0] for stop in self.until if stop), key=len, default=text)
