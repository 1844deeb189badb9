"""From messages and images to what is generated from."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image
from transformers.cli.serving.utils import BaseHandler, Modality

from vtc.serve.encode import NOTHING, Alone, Spend, prune
from vtc.serve.images import ADDRESSES
from vtc.serve.images import images as open_images
from vtc.serve.limits import Limits
from vtc.serve.memory import Full, Kept, Memory
from vtc.serve.prompt import Prompt
from vtc.serve.request import Asked
from vtc.serve.tower import Tower

Picture = tuple[Image, bytes]
"""An image and its digest."""


class Reading:
    """Prompts for one model."""

    def __init__(self, model: Any, processor: Any, tower: Tower, limits: Limits, context: int):
        """`context`: tokens of a prompt and its answer."""
        self.model, self.processor, self.tower, self.limits, self.context = model, processor, tower, limits, context
        self.memory: Memory = tower.memory
        self._beside, self._lock = copy.deepcopy(processor), threading.Lock()  # for other threads
        self._fetching = ThreadPoolExecutor(limits.waiting, "vtc-fetch")  # others wait for no address
        self.placeholder: int = tower.adapter.image_token_id
        self.characters = context * max(map(len, processor.tokenizer.get_vocab()))
        """Of a text: `context` times those of the longest token."""

    async def pictures(self, asked: Asked) -> list[Picture]:
        """Raises ValueError for what is no image, or too much of it."""

        def opened() -> list[Picture]:
            return [(image, self.memory.digest(image)) for image in open_images(asked.urls, self.limits)]

        slow = self._fetching if any(url.startswith(ADDRESSES) for url in asked.urls) else None
        return await asyncio.get_running_loop().run_in_executor(slow, opened)

    async def text(self, asked: Asked) -> tuple[str, list[int]]:
        """The prompt, with one placeholder for each image.

        Raises ValueError where text holds one, or is too long, and for too many images.
        """
        if len(asked.urls) > self.limits.images:
            raise ValueError(f"{len(asked.urls)} images; this server takes {self.limits.images} in a request")
        messages = [message.model_dump(exclude_none=True) for message in asked.messages]
        try:
            chat = BaseHandler.get_processor_inputs_from_messages(messages, Modality.VLM)
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"messages: this model's chat template says: {error}") from None
        if len(text) > self.characters:
            raise ValueError(f"a text of {len(text)} characters; this server holds {self.context} tokens")

        def tokenized() -> list[int]:
            with self._lock:
                return self._beside.tokenizer(text, add_special_tokens=self._begins(text))["input_ids"]

        ids = await asyncio.to_thread(tokenized)  # others are answered meanwhile
        if ids.count(self.placeholder) != len(asked.urls):
            token = self.processor.tokenizer.convert_ids_to_tokens(self.placeholder)
            raise ValueError(f"messages: {token} stands for an image in this model's prompts, and is no text")
        return text, ids

    def _begins(self, text: str) -> bool:
        """Whether the tokenizer is to put what begins a prompt before it: some templates have done so."""
        begin = self.processor.tokenizer.bos_token
        return begin is None or not text.startswith(begin)

    async def prompt(self, ids: Sequence[int], pictures: Sequence[Picture], spend: Spend) -> Prompt:
        """Images through the tower, and the prompt around them. Raises Alone, `Full`, ValueError."""
        futures = [self.tower.submit(image, digest, spend) for image, digest in pictures]
        try:
            found = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
            kept = self._all(pictures, found)
        except BaseException:
            for future in futures:
                future.add_done_callback(self._give_back)
            raise
        return Prompt.of(ids, self.placeholder, kept, self.memory.vocabulary)

    def _all(self, pictures: Sequence[Picture], found: Sequence[Kept | BaseException]) -> list[Kept]:
        """Raise what was in the way of one; ValueError where there is never room for all of them."""
        for error in found:
            if isinstance(error, BaseException) and not isinstance(error, Full):
                raise error
        kept, room = [one for one in found if isinstance(one, Kept)], len(self.memory.rows)
        full = {digest: one for (_, digest), one in zip(pictures, found, strict=True) if isinstance(one, Full)}
        total = sum(len(one.slots) for one in {*kept}) + sum(one.rows for one in full.values())
        if full and total > room:
            raise ValueError(f"images of {total} visual tokens together, and memory for {room}: lower the budget")
        for error in full.values():
            raise error
        return kept

    def _give_back(self, future: Future[Kept]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.memory.release(future.result())

    async def inputs(self, text: str, pictures: Sequence[Picture]) -> dict[str, Any]:
        """What `generate` takes, for a request that is alone."""
        images = [image for image, _ in pictures]
        given, begins = [images] if len(images) > 1 else images or None, self._begins(text)

        def made() -> Any:
            with self._lock:
                made = self._beside(images=given, text=[text], add_special_tokens=begins, return_tensors="pt")
            return made.to(self.model.device, dtype=self.model.dtype)

        return dict(await asyncio.to_thread(made))

    def check_length(self, tokens: int, new: int) -> None:
        """Raise ValueError for what is too long, with how long that is."""
        if tokens + new > self.context:
            raise ValueError(f"a prompt of {tokens} tokens and an answer of {new}; this server holds {self.context}")

    def reason_of_several(self) -> str | None:
        """Why no request with several images can; None where they can, each encoded as if it were alone.

        LLaVA-OneVision cuts the image of a prompt into tiles, and of several none.
        """
        from PIL import Image as pillow

        wide = pillow.new("RGB", (1536, 768))
        one, two = (self._placeholders([wide] * count) for count in (1, 2))
        return None if two == 2 * one else "this model sees several images in another way than one"

    def _placeholders(self, images: list[Image]) -> int:
        """Visual tokens of one prompt."""
        text = self.processor.tokenizer.convert_ids_to_tokens(self.placeholder) * len(images)
        made = self.processor(images=[images], text=[text], add_special_tokens=False, return_tensors="pt")
        return int((made["input_ids"] == self.placeholder).sum())

    def reason(self) -> str | None:
        """Why no request of this model can share a batch; None where it can."""
        from PIL import Image as pillow

        try:
            prune(self.model, self.tower.adapter, self.processor, [pillow.new("RGB", (64, 64))], NOTHING)
        except Alone as error:
            return str(error)
        return None
