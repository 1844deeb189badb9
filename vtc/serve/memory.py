"""What is remembered of images: the rows that the decoder reads in their place, in a tensor of a fixed size."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor


class Full(Exception):
    """No room: the images of running requests fill the memory."""


@dataclass(eq=False)
class Kept:
    """An image after pruning."""

    expansion: Sequence[int]
    """The ids that stand for it in a prompt, with a placeholder for each visual token."""
    index: Sequence[int]
    """Which of the placeholders stayed, ascending."""
    first: int
    """Its first virtual id; the others follow. No other image has had them, nor will have."""
    slots: Tensor
    """(kept,) int32: where its rows are in `Memory.rows`."""
    renumbered: bool = False
    """Whether its method renumbers survivors without gaps."""
    tokens: int = 0
    """Visual tokens before pruning."""
    users: int = 0
    """Requests that are not over."""


class Memory:
    """The rows of the images that were seen last, by content.

    A place is free again when its image was not used for the longest time and no request needs it. Ids are never used
    twice: a block of the paged cache that is found by them holds what belongs to this very image.
    """

    def __init__(self, model: Any, capacity: int):
        """Of `capacity` visual tokens, for the decoder of `model`."""
        embedding = model.get_input_embeddings()
        self.vocabulary: int = embedding.num_embeddings
        self.rows = torch.zeros(capacity, embedding.embedding_dim, dtype=model.dtype, device=model.device)
        """(capacity, width)."""
        self._free = list(range(capacity))[::-1]
        self._images: OrderedDict[Hashable, Kept] = OrderedDict()
        self._secret = secrets.token_bytes(32)
        self._next = self.vocabulary + capacity
        self._lock = threading.Lock()

    def digest(self, image: Image) -> bytes:
        """Of what an image shows. Nobody outside can make one: it is keyed by a secret of this process."""
        shape = f"{image.mode} {image.size}".encode()
        return hashlib.blake2b(shape + b"\0" + image.tobytes(), key=self._secret, digest_size=32).digest()

    def find(self, key: Hashable) -> Kept | None:
        """A remembered image, for one more user."""
        with self._lock:
            if (kept := self._images.get(key)) is not None:
                self._images.move_to_end(key)
                kept.users += 1
            return kept

    def add(self, key: Hashable, rows: Tensor, **about: Any) -> Kept:
        """Remember an image by `rows` (kept, width), for one user. Raises `Full`."""
        with self._lock:
            for old in [old for old, kept in self._images.items() if not kept.users]:
                if len(self._free) >= len(rows):
                    break
                self._free += self._images.pop(old).slots.tolist()
            if len(self._free) < len(rows):
                raise Full(f"{len(rows)} visual tokens do not fit beside those of running requests")
            if self._next + len(rows) > 2**31:
                raise OverflowError("all virtual ids are used up: start the server anew")
            slots = [self._free.pop() for _ in range(len(rows))]
            kept = Kept(first=self._next, slots=torch.tensor(slots, dtype=torch.int32), users=1, **about)
            self._next += len(rows)
            self.rows[slots] = rows.to(self.rows)
            if self.rows.is_cuda:
                torch.cuda.synchronize(self.rows.device)  # the engine reads on a stream of its own
            self._images[key] = kept
            return kept

    def release(self, kept: Kept) -> None:
        """The end of one user."""
        with self._lock:
            kept.users -= 1

    @property
    def used(self) -> int:
        """Visual tokens that are remembered."""
        return len(self.rows) - len(self._free)
