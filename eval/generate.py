"""Continues a prompt with a trained model.

    python -m eval.generate CHECKPOINT --prompt "Once upon a time"

Only the continuation goes to standard output. Temperature 0 takes the likeliest token at every step.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from eval.loading import EvaluationError, decode, encode_document, load_checkpoint, report_errors, visible


def continue_prompt(
    model: DLCMForCausalLM | LlamaBaselineForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """What the model says after the prompt, which is read as the beginning of a document.

    Raises:
        EvaluationError: a value outside its range, an empty prompt, or more tokens than the model has positions.
    """
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise EvaluationError(f"temperature={temperature} must be 0 (greedy) or more, and finite")
    if not 0 < top_p <= 1:
        raise EvaluationError(f"top_p={top_p} must lie above 0 and not above 1")
    positions = model.config.max_position_embeddings
    input_ids_1T = encode_document(tokenizer, prompt).input_ids_1T.to(model.device)
    prompt_tokens = input_ids_1T.shape[1]
    if prompt_tokens + max_new_tokens > positions:
        raise EvaluationError(
            f"{prompt_tokens} tokens of prompt and max_new_tokens={max_new_tokens} need more than the model's "
            f"{positions} positions (max_position_embeddings); shorten one of them"
        )

    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    torch.manual_seed(seed)  # generate() draws from torch's default generator
    ids_1T = model.generate(  # type: ignore[misc]  # its annotation names a protocol that no model meets
        input_ids_1T,
        attention_mask=torch.ones_like(input_ids_1T),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=False,
            **sampling,
        ),
    )
    return decode(tokenizer, ids_1T[0, prompt_tokens:])


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.generate", description="Continues a prompt.")
    parser.add_argument("checkpoint", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    options = parser.parse_args(arguments)

    loaded = load_checkpoint(options.checkpoint)
    continuation = continue_prompt(
        loaded.model,
        loaded.tokenizer,
        options.prompt,
        options.max_new_tokens,
        options.temperature,
        options.top_p,
        options.seed,
    )
    print(visible(continuation))


if __name__ == "__main__":
    sys.exit(main())
