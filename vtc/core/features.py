"""What the vision tower showed about each image, and where the image stands in the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vtc.core.clock import Passage
from vtc.grids import Grid, cells
from vtc.need import Need


@dataclass(frozen=True)
class Encoded:
    """What the vision tower showed about one image or video."""

    rows: dict[Need, Tensor]
    """(channels, tokens) of each need."""
    grids: list[Grid]
    """The grids that its tokens form, in token order."""

    @property
    def tokens(self) -> int:
        return cells(self.grids)

    def __add__(self, other: Encoded) -> Encoded:
        """Both as one image."""
        rows = {need: torch.cat((row, other.rows[need]), dim=1) for need, row in self.rows.items()}
        return Encoded(rows, self.grids + other.grids)


@dataclass(frozen=True)
class Encoding:
    """What one run of the tower showed. It travels as an entry of the encoder's output, which generate() hands from
    encoding to prefill; for beams it repeats the features there, row by row of the batch."""

    images: list[Encoded]
    entries: int
    """Features of the output object, before any were repeated."""
    passages: list[Passage]
    """What the tower and the projector took, and what those rows took."""

    def shows(self, needs: Iterable[Need]) -> bool:
        """Whether the tower was observed for all that these needs ask of it."""
        return all(need in image.rows for image in self.images for need in needs if need.tower)

    def repeated(self, copies: int, tokens_per_row: list[int]) -> list[Encoded]:
        """The images in prompt order of a batch whose rows, with so many visual tokens, come in runs of `copies`."""
        images, result = iter(self.images), []
        for tokens in tokens_per_row[::copies]:
            row = []
            while tokens > 0:
                row.append(next(images))
                tokens -= row[-1].tokens
            result += row * copies
        return result


@dataclass(frozen=True)
class Placed:
    """An image and where it stands in the flattened (batch, length) prompt."""

    image: Encoded
    places: Tensor
    """(tokens,) int64."""
    first: int
    last: int
    shown: int = 0
    """How many of its tokens the attention mask does not hide."""


def locate(
    encodings: Iterable[tuple[Encoding | None, int, Tensor]], needs: Sequence[Need], length: int, joins_tiles: bool
) -> list[Placed]:
    """The images of a prompt, in its order.

    Args:
        encodings: for each modality what the tower showed, how many features the encoder's output holds by now, and
            where the placeholders are, (batch, length) bool.
        needs: what has to be known of each image.
        length: of the prompt's rows.
        joins_tiles: whether images whose places touch are tiles of one.

    Raises RuntimeError for features that were encoded where the tower was not observed.
    """
    found: list[tuple[Encoded, Tensor]] = []
    for encoding, entries, mask in encodings:
        if encoding is None or not encoding.shows(needs):
            raise RuntimeError(
                "these image features were encoded before vtc.wrap, or for another method: the tower was not observed "
                "as this one needs it; encode them anew"
            )
        images = encoding.images
        if entries != encoding.entries:
            images = encoding.repeated(entries // encoding.entries, mask.sum(1).tolist())
        counts = [image.tokens for image in images]
        places = torch.nonzero_static(mask.flatten(), size=sum(counts))[:, 0].split(counts)
        found += zip(images, places, strict=True)
    if not found:
        return []
    ends = torch.stack([places[[0, -1]] for _, places in found]).tolist()
    placed = [Placed(*image, *end) for image, end in zip(found, ends, strict=True)]
    placed.sort(key=lambda one: one.first)
    return _joined(placed, length) if joins_tiles else placed


def _joined(placed: Sequence[Placed], length: int) -> list[Placed]:
    """With tiles whose places touch within a row of `length` as one image."""
    result = [placed[0]]
    for tile in placed[1:]:
        before = result[-1]
        if tile.first == before.last + 1 and tile.first % length:
            places = torch.cat((before.places, tile.places))
            result[-1] = Placed(before.image + tile.image, places, before.first, tile.last)
        else:
            result.append(tile)
    return result


def tower_rows(images: Sequence[Placed], needs: Iterable[Need], device: torch.device) -> dict[Need, Tensor]:
    """What the tower showed about each image, padded to the widest: (images, channels, tokens) by need."""

    def padded(need: Need) -> Tensor:
        rows = [image.image.rows[need].to(device).T for image in images]
        return pad_sequence(rows, batch_first=True).transpose(1, 2)

    return {need: padded(need) for need in needs if need.tower}
