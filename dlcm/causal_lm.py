"""What the DLCM and its baseline share as language models: the door to packed rows, the loss, generation.

A padded (B, L) batch is packed at the door and padded again on the way out; inside there are only packed documents.
So rows, packed documents and padding cannot differ, and there is no second code path to keep right.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from dlcm import mup
from dlcm.config import TokenBlocksConfig
from dlcm.layout import PackedLayout, RowLayout
from dlcm.linear_cross_entropy import IGNORED, linear_cross_entropy


class PackedCausalLM(PreTrainedModel, GenerationMixin):
    """Base class: subclasses define `embed_tokens`, `lm_head` and what lies between.

    Attributes:
        compiled: whether the loss without logits may use torch.compile.
    """

    config: TokenBlocksConfig
    embed_tokens: nn.Embedding
    lm_head: nn.Linear
    compiled: bool = False

    def initialize_weights(self) -> None:
        """Draws what no checkpoint has filled (hook of transformers; roles follow from the whole model's names)."""
        mup.initialize_(self, self.config)

    def open_rows(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> tuple[Tensor, RowLayout, PackedLayout]:
        """The packed row (T,), the way back to (B, L), and the documents.

        Raises:
            ValueError: both a mask and `cu_seqlens`, several packed rows, an empty row or document, or a document
                longer than `max_position_embeddings`.
        """
        if cu_seqlens is not None:
            if attention_mask_BL is not None:
                raise ValueError("give either attention_mask (padded rows) or cu_seqlens (one packed row), not both")
            if input_ids_BL.shape[0] != 1:
                raise ValueError(f"cu_seqlens describes one packed row, got a batch of {input_ids_BL.shape[0]}")
            rows, _ = RowLayout.full(*input_ids_BL.shape)
        elif attention_mask_BL is not None:
            if attention_mask_BL.shape != input_ids_BL.shape:
                raise ValueError(
                    f"attention_mask of shape {tuple(attention_mask_BL.shape)} does not fit "
                    f"input_ids of shape {tuple(input_ids_BL.shape)}"
                )
            rows, cu_seqlens = RowLayout.from_mask(attention_mask_BL)
        else:
            rows, cu_seqlens = RowLayout.full(*input_ids_BL.shape)
        input_ids_T = rows.pack(input_ids_BL)
        layout = PackedLayout.from_cu_seqlens(cu_seqlens, len(input_ids_T), max_seqlen, input_ids_T.device)
        if layout.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"a document of {layout.max_seqlen} tokens is longer than "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        return input_ids_T, rows, layout

    def read_out(
        self,
        h_TE: Tensor,
        labels_BL: Tensor | None,
        rows: RowLayout,
        layout: PackedLayout,
        num_items: int | Tensor | None,
        return_logits: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, L, V) and next-token loss inside each document, in nats.

        Logits are multiplied by 1 / s_token (section 6.1). Without `return_logits` they are None, and the loss comes
        from `linear_cross_entropy`, which never holds them all. The loss, None without labels, is the sum over valid
        targets divided by `num_items`, or else by the number of valid targets, at least 1.

        Raises:
            ValueError: neither logits nor labels.
        """
        if labels_BL is None and not return_logits:
            raise ValueError("return_logits=False needs labels: without logits there is nothing but a loss")
        h_TE = h_TE / self.config.token_width_multiplier  # the small side of the product
        logits_TV = self.lm_head(h_TE) if return_logits else None
        loss = None
        if labels_BL is not None:
            target_T = next_targets(rows.pack(labels_BL), layout)
            if logits_TV is None:
                total = linear_cross_entropy(h_TE, self.lm_head.weight, target_T, compiled=self.compiled)
            else:
                wide = torch.promote_types(logits_TV.dtype, torch.float32)
                total = F.cross_entropy(logits_TV.to(wide), target_T, ignore_index=IGNORED, reduction="sum")
            loss = total / ((target_T != IGNORED).sum().clamp(min=1) if num_items is None else num_items)
        return None if logits_TV is None else rows.unpack(logits_TV), loss

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> bool:
        """Refuses a cache where transformers' `generate` would make one."""
        if generation_config.use_cache:
            raise ValueError("use_cache=True is not supported: this model decodes without a cache")
        return False

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor | None]:
        """Every step is a full forward over the whole prefix (hook of transformers' `generate`)."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


def next_targets(labels_T: Tensor, layout: PackedLayout) -> Tensor:
    """The label that follows each position in its document, `IGNORED` for the last of them."""
    return labels_T.roll(-1).index_fill(0, layout.cu_seqlens_D1[1:].long() - 1, IGNORED)
