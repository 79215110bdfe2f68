"""The LLaMA baseline, built from the very blocks of the DLCM's encoder and decoder.

Same blocks, same packing, same parametrisation: a difference in loss is a difference of architecture.
`to_llama()` hands the weights to `transformers`' own LLaMA, which is also the proof that the blocks are LLaMA's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

from dlcm.blocks import TransformerStack, token_block_shape
from dlcm.cache import Appending, DecodingCache, Stepping
from dlcm.causal_lm import PackedCausalLM
from dlcm.config import LlamaBaselineConfig
from dlcm.decoding import Call, directly
from dlcm.layout import Extension
from dlcm.selfcompress.quantiser import quantise_linears_
from dlcm.selfcompress.removal import leave_channels_


@dataclass
class LlamaBaselineOutput(ModelOutput):
    """loss (equal to ce_loss) in nats if labels were given; logits (B, L, V), unless declined; the cache, if used."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    ce_loss: Tensor | None = None
    past_key_values: DecodingCache | None = None


class LlamaBaselineForCausalLM(PackedCausalLM[DecodingCache]):
    """Token blocks between embedding and unembedding: LLaMA, unless `qk_norm` or a `token_window` is asked for."""

    config_class = LlamaBaselineConfig
    config: LlamaBaselineConfig
    cache_class = DecodingCache

    def __init__(self, config: LlamaBaselineConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_token)
        self.decoder = TransformerStack(token_block_shape(config), config.windows("decoder"))
        self.decoder_norm = nn.RMSNorm(config.d_token, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_token, config.vocab_size, bias=False)
        quantise_linears_(self, config)
        leave_channels_(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: DecodingCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool = True,
        return_dict: bool = True,
    ) -> LlamaBaselineOutput | tuple:
        """Arguments, losses and errors as in `DLCMForCausalLM.forward`."""
        cache = self.cache_to_use(past_key_values, use_cache, labels, cu_seqlens)
        if cache is not None:
            kept, _, _ = self.decode(input_ids, attention_mask, cache, logits_to_keep)
            answer = LlamaBaselineOutput(logits=kept, past_key_values=cache)
            return answer if return_dict else answer.to_tuple()
        input_ids_T, rows, tokens = self.open_rows(input_ids, attention_mask, cu_seqlens, max_seqlen)
        h_TE = self.decoder(self.embed_tokens(input_ids_T), tokens)
        h_TE = self.decoder_norm(h_TE)
        logits, loss = self.read_out(h_TE, labels, rows, tokens, num_items_in_batch, return_logits, logits_to_keep)
        output = LlamaBaselineOutput(loss=loss, logits=logits, ce_loss=loss)
        return output if return_dict else output.to_tuple()

    def extend(self, input_ids_T: Tensor, new: Extension, cache: DecodingCache) -> tuple[Tensor, None]:
        past = cache.stack("decoder", cache.tokens, Appending(new))
        h_TE = self.decoder(self.embed_tokens(input_ids_T), new.layout, past)
        return self.decoder_norm(h_TE), None

    def step(
        self, input_ids_B: Tensor, active_B: Tensor, cache: DecodingCache, call: Call = directly, whole: bool = False
    ) -> tuple[Tensor, None]:
        return call(self.answer, input_ids_B, active_B, cache), None

    def answer(self, input_ids_B: Tensor, active_B: Tensor, cache: DecodingCache) -> Tensor:
        """A step: logits (B, V)."""
        where = Stepping.of(cache.length_B, active_B, cache.tokens)
        past = cache.stack("decoder", cache.tokens, where)
        h_BE = self.decoder(self.embed_tokens(input_ids_B), where.layout, past)
        cache.length_B += active_B
        return self.last_logits(self.decoder_norm(h_BE)[:, None])[:, 0]

    @torch.no_grad()
    def to_llama(self) -> LlamaForCausalLM:
        """The same model as `transformers`' LLaMA, with a copy of the weights.

        Raises:
            ValueError: qk_norm is on or there is a token_window, which LLaMA has not, or weights are rounded in the
                forward pass.
        """
        config = self.config
        if config.qk_norm:
            raise ValueError("to_llama() needs qk_norm=false: transformers' LLaMA has no RMSNorm on queries and keys")
        if config.token_window is not None:
            raise ValueError(
                "to_llama() needs token_window=null: every token of transformers' LLaMA sees all before it"
            )
        if config.quantiser != "none":
            raise ValueError("to_llama() needs plain weights: call dlcm.selfcompress.quantiser.plain(model) first")
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.d_token,
                intermediate_size=config.token_ffn,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.token_heads,
                num_key_value_heads=config.token_kv_heads,
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=False,
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            )
        )
        weights = {_llama_name(name): weight for name, weight in self.state_dict().items()}
        weights["lm_head.weight"] = weights["lm_head.weight"] / config.token_width_multiplier  # muP's logit factor
        llama.load_state_dict(weights)
        nn.Module.to(llama, device=self.device, dtype=self.dtype)
        return llama.train(self.training)


def _llama_name(name: str) -> str:
    if name == "lm_head.weight":
        return name
    for ours, theirs in (
        ("decoder_norm", "norm"),
        ("decoder.layers", "layers"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        (".attention.", ".self_attn."),
        (".ffn.", ".mlp."),
    ):
        name = name.replace(ours, theirs)
    return f"model.{name}"
