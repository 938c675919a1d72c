"""PaliGemma and PaliGemma 2: a SigLIP encoder, a linear projection, a Gemma.

PaliGemma was trained with full attention over pictures and prompt. A history cannot be read in that way, since a prefix
would see its future. So the tokens of one picture attend to each other, and everything else is causal. Every sequence
begins with <bos>, which Gemma needs; the state of <bos> itself is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from pixrec.model.families.base import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PaliGemma(Family):
    causal = False
    first_position = 1

    @property
    def tokens_per_picture(self) -> int:
        return int((self.image_size_px // self.config.vision_config.patch_size) ** 2)

    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Tensor:
        return model.model.get_image_features(pixels).pooler_output

    def hidden_states(
        self, model: PreTrainedModel, embeddings: Tensor, is_token: Tensor, picture_slot: Tensor, deeper: Tensor
    ) -> Tensor:
        rows, width = embeddings.shape[0], embeddings.shape[2]
        bos = torch.full((1, 1), self.config.text_config.bos_token_id, device=embeddings.device)
        start = model.get_input_embeddings()(bos).to(embeddings.dtype).expand(rows, 1, width)
        embeddings = torch.cat([start, embeddings], dim=1)
        picture = torch.where(picture_slot >= 0, picture_slot // self.tokens_per_picture, -1)
        masks: dict[str, Any] = {
            "config": self.config.text_config,
            "inputs_embeds": embeddings,
            "attention_mask": torch.cat([is_token.new_ones(rows, 1), is_token], dim=1),
            "past_key_values": None,
            "block_sequence_ids": torch.cat([picture.new_full((rows, 1), -1), picture], dim=1),
        }
        # The mask is always a tensor: with none at all sdpa would not be causal here.
        make = transformers.masking_utils
        mask: Any = make.create_causal_mask(**masks)
        if getattr(self.config.text_config, "sliding_window", None) is not None:
            mask = {"full_attention": mask, "sliding_attention": make.create_sliding_window_causal_mask(**masks)}
        positions = torch.arange(embeddings.shape[1], device=embeddings.device).unsqueeze(0) + self.first_position
        output = self.language_model(model)(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return output.last_hidden_state[:, 1:]

    def token_logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        logits = super().token_logits(model, hidden)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
