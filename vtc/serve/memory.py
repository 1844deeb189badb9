"""What is remembered of images: the rows that the decoder reads in their place, in a tensor of a fixed size."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from vtc.serve.encode import Pruned


class Full(Exception):
    """No room: the images of running requests fill the memory."""

    def __init__(self, rows: int):
        super().__init__(f"{rows} visual tokens do not fit beside those of running requests")
        self.rows = rows


@dataclass(eq=False)
class Kept:
    """An image after pruning."""

    pruned: Pruned
    """Without its rows."""
    id: int
    """Its virtual id: no other image has had it, nor will have."""
    slots: Tensor
    """(kept,) int32: where its rows are in `Memory.rows`."""
    users: int = 1
    """Requests that are not over."""


class Memory:
    """The rows of the images that were seen last, by content.

    A place is free again when its image was not used for the longest time and no request needs it. An id is never used
    twice: a block of the paged cache that is found by it holds what belongs to this very image.
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
        self._next = self.vocabulary + 1
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

    def add(self, key: Hashable, pruned: Pruned) -> Kept:
        """Remember an image, for one user. Raises `Full`, or ValueError where there is never room for it."""
        rows = pruned.rows
        if len(rows) > len(self.rows):
            raise ValueError(f"an image of {len(rows)} visual tokens, and memory for {len(self.rows)}")
        with self._lock:
            for old in [old for old, kept in self._images.items() if not kept.users]:
                if len(self._free) >= len(rows):
                    break
                self._free += self._images.pop(old).slots.tolist()
            if len(self._free) < len(rows):
                raise Full(len(rows))
            if self._next >= 2**31:
                raise RuntimeError("two billion images have used up all virtual ids: start the server anew")
            slots = [self._free.pop() for _ in range(len(rows))]
            about = replace(pruned, rows=rows.new_empty(0))
            kept = Kept(about, self._next, torch.tensor(slots, dtype=torch.int32))
            self._next += 1
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
