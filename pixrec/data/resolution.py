"""Whether the stored pictures of a data set have the pixels that a backbone takes, or are enlarged for it.

Knows the picture store and the headers of pictures; decodes none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixrec import storage
from pixrec.data.images import PictureSize, stored_size
from pixrec.data.items import DATASET_MARKER, PICTURES_FOLDER
from pixrec.data.pictures import open_pictures
from pixrec.errors import UnreadableImage

LOOKED_AT, _ROUND_PX = 200, 32


@dataclass(frozen=True)
class Resolution:
    """What a sample of the stored pictures shows."""

    data: str
    backbone: str
    size: PictureSize
    looked_at: int
    small: int
    """of those, how many the backbone takes larger than they are stored"""
    cure_px: int | None
    """a `prepare.image_size_px` with which fewer would be; None where they came so small"""

    def __str__(self) -> str:
        """One line that says what is enlarged, and the cure."""
        wanted = f"{self.size} by {self.size} px" if isinstance(self.size, int) else f"{self.size.min_pixels:,} pixels"
        cure = "find larger ones"
        if self.cure_px is not None:
            cure = f"prepare again with prepare.image_size_px={self.cure_px}"
        return (
            f"model.backbone {self.backbone} takes pictures of {wanted}, but {self.small} of {self.looked_at} stored "
            f"pictures of {self.data} have fewer and are enlarged, which shows it nothing more; {cure}, or set "
            "model.small_pictures to allow"
        )


def resolution(data: str, backbone: str, size: PictureSize) -> Resolution:
    """Look at pictures spread over the whole data set at `data`. Raises ArtifactError where there is none."""
    pictures = open_pictures(storage.join(data, PICTURES_FOLDER))
    with_picture = np.flatnonzero(pictures.present())
    places = np.linspace(0, max(0, len(with_picture) - 1), min(len(with_picture), LOOKED_AT))
    found = [_size(picture) for picture in pictures.read(with_picture[places.astype(int)]) if picture is not None]
    sizes = np.array([stored for stored in found if stored is not None], np.int64).reshape(-1, 2)
    least = size * size if isinstance(size, int) else size.min_pixels
    small = sizes[sizes.prod(1) < least]
    limit = storage.read_json(storage.join(data, DATASET_MARKER)).get("config", {}).get("image_size_px")
    shrunk = small if limit is None else small[small.max(1) >= limit]
    cure = None
    if len(shrunk):
        longest = (shrunk.max(1) * np.sqrt(least / shrunk.prod(1))).max()
        cure = int(np.ceil(longest / _ROUND_PX)) * _ROUND_PX
    return Resolution(data, backbone, size, len(sizes), len(small), cure)


def _size(picture: bytes) -> tuple[int, int] | None:
    try:
        return stored_size(picture)
    except UnreadableImage:
        return None
