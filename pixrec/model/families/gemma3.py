"""Gemma 3 with pictures: a SigLIP encoder whose patches are averaged, a linear projection, a Gemma 3.

It reads as PaliGemma is read here: the tokens of one picture see each other, all else is causal, and <bos> comes first.
Most of its layers look back no further than a window, which is always longer than a picture.
"""

from __future__ import annotations

from pixrec.model.families.paligemma import PaliGemma


class Gemma3(PaliGemma):
    picture_prefix = ("\n\n", "<start_of_image>")
    picture_suffix = ("<end_of_image>", "\n\n")
    first_position = 0

    @property
    def tokens_per_picture(self) -> int:
        return int(self.config.mm_tokens_per_image)
