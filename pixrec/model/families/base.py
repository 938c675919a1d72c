"""The adapter that a family fills in: how a picture is written, how it is encoded, how a sequence is read.

Shapes: B rows · T tokens · P pictures · K tokens a tile · W width of the language model · X numbers of a picture
token: W, and what else the decoder is given of it · N tiles of all pictures · S side of a tile in pixels
· V vocabulary.

A picture is cut into square tiles: the pieces that the encoder takes. For most families the whole picture, made a
square, is one tile of K tokens; where pictures keep their shape a tile is what becomes one token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from pixrec.data.images import PictureSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Family(ABC):
    """Base adapter; `model` is what AutoModelForImageTextToText returned.

    Whatever a family does, the state of a token must not depend on later items: v_U of a prefix is read inside a
    longer history.
    """

    picture_prefix: tuple[str, ...] = ()
    """Tokens before the picture tokens."""
    picture_suffix: tuple[str, ...] = ()
    """Tokens after them."""
    language_part: str = "language_model"
    """Name of the language model in `model.model`."""
    vision_parts: tuple[str, ...] = ("vision_tower", "multi_modal_projector")
    """Names in `model.model` of all that only pictures use, the encoder first."""
    language_attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of the projections in an attention block of the language model."""
    vision_attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Names of those in a block of the encoder."""
    causal: bool = True
    """Whether a token sees all before it and nothing behind; else attention needs a mask."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config: Any = model.config

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def image_size_px(self) -> int:
        size = self.config.vision_config.image_size
        return int(size if isinstance(size, int) else size[0])

    @property
    @abstractmethod
    def tokens_per_picture(self) -> int:
        """How many tokens a picture becomes; where pictures keep their shape, a square of `image_size_px`."""

    @property
    def picture_size(self) -> PictureSize:
        """What pictures are decoded to."""
        return self.image_size_px

    @property
    def tile_px(self) -> int:
        """S, the side of a tile."""
        return self.image_size_px

    @property
    def tokens_per_tile(self) -> int:
        """K: how many tokens a tile becomes."""
        return self.tokens_per_picture

    def limit_pixels(self, own: tuple[int, int] | None, least: int | None, most: int) -> None:
        """Set how few and how many pixels a picture may have, where the family takes any shape: no more than `most` and
        what the backbone's processor says (`own`), no fewer than `least`, or than it says."""
        return

    @property
    def picture_width(self) -> int:
        """X, the width of a picture token: W, and more where deeper layers are given picture features as well."""
        return int(self.config.text_config.hidden_size)

    @property
    def unread_parts(self) -> tuple[str, ...]:
        """Names in the encoder of what no picture token is made by."""
        return ("head",)

    @property
    def vision_settings(self) -> tuple[Any, ...]:
        """Settings of the vision part that its weights do not show, for its fingerprint."""
        return ()

    @abstractmethod
    def encode_pictures(self, model: PreTrainedModel, pixels: Tensor, grid: Tensor) -> Tensor:
        """Normalised tiles (N, 3, S, S) of pictures of `grid` (P, 2, on the CPU) rows and columns of them to tokens
        (N, K, X)."""

    def tune(self, model: PreTrainedModel) -> None:
        """Set what a part of `model` computes faster otherwise, once `use_attention` has chosen how."""
        return

    def language_model(self, model: PreTrainedModel) -> nn.Module:
        """The module that takes `inputs_embeds` and returns `last_hidden_state`."""
        return model.model.get_submodule(self.language_part)

    def vision_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """All parameters that only pictures use."""
        return [p for name, p in model.model.named_parameters() if name.split(".")[0] in self.vision_parts]

    def token_parameters(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """Of those the ones that picture tokens follow from. A SigLIP's pooling head, say, is drawn at random where
        the checkpoint has none, and no token is made by it."""
        unread = tuple(f"{self.vision_parts[0]}.{part}." for part in self.unread_parts)
        named = model.model.named_parameters()
        return [p for n, p in named if n.split(".")[0] in self.vision_parts and not n.startswith(unread)]

    def attention_layers(self, where: Literal["language", "vision", "all"]) -> str:
        """Pattern of the full names of the attention's projections, as peft reads one."""
        patterns = {
            "language": rf"model\.{self.language_part}\..*\.({'|'.join(self.language_attention)})",
            "vision": rf"model\.{self.vision_parts[0]}\..*\.({'|'.join(self.vision_attention)})",
        }
        return "|".join(patterns.values()) if where == "all" else patterns[where]

    @property
    def vision_layers(self) -> str:
        """Pattern of the full names of all modules that only pictures use."""
        return rf"model\.({'|'.join(self.vision_parts)})(\..*)?"

    def hidden_states(
        self, model: PreTrainedModel, embeddings: Tensor, is_token: Tensor, picture_slot: Tensor, deeper: Tensor
    ) -> Tensor:
        """Embeddings (B, T, W), padded on the right, to last hidden states (B, T, W).

        `is_token` and `picture_slot` (B, T) as in `encoding.Items`; `deeper` (P·K, X - W) is what the picture tokens
        hold beyond their embeddings, which are in `embeddings` already.

        A token looks back only, so none looks at the padding behind it: no mask is made, which leaves attention the
        faster kernels. What stands at padding has no meaning.
        """
        return self.language_model(model)(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    def token_logits(self, model: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Scores (…, V) of the next token from hidden states (…, W)."""
        return model.get_output_embeddings()(hidden)
