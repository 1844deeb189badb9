"""`/v1/chat/completions`: from a request to its answer."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager

from vtc.serve.alone import Solo
from vtc.serve.encode import Alone, Spend
from vtc.serve.engine import Packed, State
from vtc.serve.gate import problem
from vtc.serve.memory import Full
from vtc.serve.metrics import Metrics
from vtc.serve.reading import Picture, Reading
from vtc.serve.request import Asked, read
from vtc.serve.stops import Stops
from vtc.serve.ticket import Ticket
from vtc.wrapping import bound


class Chat(ChatCompletionHandler):
    """Answers requests: packed where that is exact, alone where not."""

    def __init__(self, models: ModelManager, state: State, reading: Reading, metrics: Metrics):
        super().__init__(models, state)
        self.reading, self.metrics = reading, metrics
        self.packed: Packed = state.packed
        self.alone = GenerateManager()
        self.why_alone = reading.reason() or self.packed.engine.reason()
        """Why no request of this model can be packed; None where they can."""
        self.why_several_alone = self.why_alone or reading.reason_of_several()
        """Why none with several images can."""
        self.default: Callable[[], Spend]
        """Method and budget of a request that names none, at this load."""

    async def handle_request(self, body: dict, request_id: str) -> StreamingResponse | JSONResponse:
        """`request_id` is the client's: it goes back in a header, and is not looked at here."""
        try:
            asked, ticket = read(body), Ticket()
            if asked.model != self.model_manager.force_model:
                raise HTTPException(404, f"no model {asked.model!r} here, but {self.model_manager.force_model!r}")
            ticket.spend, ticket.stops = asked.spend(self.default()), Stops(asked.stop or ())
            ticket.counted = asked.counted
            config = self._config(asked)
            ticket.ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            text, ids = await self.reading.text(asked)
            self.reading.check_length(len(ids), config.max_new_tokens)  # before what takes long; an image counts 1 here
            pictures = await self.reading.pictures(asked)
            why_alone = self.why_several_alone if len(pictures) > 1 else self.why_alone
            if why_alone is None and asked.packed:
                try:
                    return await self._packed(asked, ticket, config, ids, pictures)
                except Alone:
                    pass
            return await self._alone(asked, ticket, config, text, pictures)
        except ValueError as error:
            raise HTTPException(400, self.public(str(error))) from None
        except Full as error:
            raise HTTPException(429, str(error), {"retry-after": "1"}) from None

    def public(self, said: str) -> str:
        """What an error says, without where the model lies on this machine."""
        home, name = getattr(self.reading.model.config, "_name_or_path", ""), str(self.model_manager.force_model)
        return said.replace(str(Path(home)), name) if home and Path(home).is_dir() else said

    def _config(self, asked: Asked) -> GenerationConfig:
        """Greedy, unless a temperature is asked for."""
        most, new = self.reading.limits.new_tokens, asked.max_tokens
        if new is not None and new > most:
            raise ValueError(f"max_tokens: {new}; this server answers with {most} at most")
        config = copy.deepcopy(self.reading.model.generation_config)
        config.max_new_tokens, config.max_length, config.num_beams = new or most, None, 1
        config.do_sample = asked.sampled
        if asked.sampled:
            config.temperature, config.top_p = asked.temperature, asked.top_p
        config.stop_strings = None  # those of a request are in its ticket
        return config

    async def _packed(
        self, asked: Asked, ticket: Ticket, config: GenerationConfig, ids: list[int], pictures: list[Picture]
    ) -> StreamingResponse | JSONResponse:
        prompt = await self.reading.prompt(ids, pictures, ticket.spend)
        self.packed.engine.prompts[ticket] = prompt  # from here on the engine gives its images back
        try:
            self.reading.check_length(prompt.unpruned, config.max_new_tokens)
            ticket.packed, ticket.prompt_tokens = True, prompt.unpruned
            ticket.before = sum(kept.pruned.tokens for kept in prompt.images)
            ticket.after = sum(len(kept.slots) for kept in prompt.images)
            inputs = {"input_ids": ids, "prompt": prompt}
            parts = (self.reading.model, self.reading.processor, asked.model, inputs, config, self.packed)
            if asked.stream:
                return self._streamed(lambda: self.packed.engine.cancel_request(ticket), ticket, *parts)
            return await self._non_streaming(ticket, *parts)
        except BaseException:
            self.packed.engine.cancel_request(ticket)
            raise

    async def _alone(
        self, asked: Asked, ticket: Ticket, config: GenerationConfig, text: str, pictures: list[Picture]
    ) -> StreamingResponse | JSONResponse:
        inputs = await self.reading.inputs(text, pictures)
        solo: Any = Solo(self.reading.model, ticket, self.reading.processor.decode, inputs)
        ticket.packed, ticket.prompt_tokens = False, inputs["input_ids"].shape[1]
        ticket.before = ticket.after = 0
        self.reading.check_length(ticket.prompt_tokens, config.max_new_tokens)
        ids = {"input_ids": inputs["input_ids"]}  # the rest is with `solo`, which lets go of it
        parts = (solo, self.reading.processor, asked.model, ids, config, self.alone)
        if asked.stream:
            # what method or budget raise is raised here: once a stream has begun its status is told
            await asyncio.to_thread(bound, self.reading.model, *ticket.spend)
            return self._streamed(solo.leave, ticket, *parts)
        whole = asyncio.ensure_future(self._non_streaming(ticket, *parts))
        try:
            return await asyncio.shield(whole)
        except asyncio.CancelledError:
            solo.leave()
            whole.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody asks any more
            raise

    def _streamed(self, over: Callable[[], None], *parts: Any) -> StreamingResponse:
        """`over` is called when the reply has ended, also where its client left before the first part was asked for."""
        response = self._streaming(*parts)
        if (task := asyncio.current_task()) is not None:
            task.add_done_callback(lambda _: over())
        response.body_iterator = _with_end(response.body_iterator, self.public)  # type: ignore[arg-type]
        return response

    # -- replies --------------------------------------------------------------------------------------------------

    def _build_completion(self, request_id: str, content: str, *args: Any, **kwargs: Any) -> dict:
        reply = self._told(request_id, {"content": content, **kwargs})
        return super()._build_completion(request_id, reply.pop("content"), *args, **reply)

    def _build_chunk_sse(self, request_id: str = "", *args: Any, **kwargs: Any) -> str:
        return super()._build_chunk_sse(request_id, *args, **self._told(request_id, kwargs))

    def _told(self, ticket: str, reply: dict[str, Any]) -> dict[str, Any]:
        """What a reply is made of: without stop strings, and with more in its usage where it is the last part."""
        if not isinstance(ticket, Ticket):
            return reply
        usage, content, stops = reply.get("usage"), reply.get("content"), ticket.stops
        if stops.strings and (usage or content):
            reply = {**reply, "content": stops.tell(content or "", last=usage is not None)}
        if usage is None:
            return reply
        self.metrics.answered(ticket, usage.completion_tokens)
        told = ticket.usage(usage) if ticket.counted else None
        return {**reply, "usage": told, **({"finish_reason": "stop"} if stops.over or ticket.ended else {})}


FAILED = 'data: {"error": "'
"""How upstream's chunk of an error begins, with the text as it is; in JSON, text has no quotation mark of this kind."""


async def _with_end(chunks: AsyncIterator[str], public: Callable[[str], str]) -> AsyncIterator[str]:
    """With the line that ends a stream for OpenAI's clients, or an error as they read it."""
    try:
        async for chunk in chunks:
            before, failed, why = chunk.partition(FAILED)
            if before:
                yield before
            if failed:
                error = problem(500, public(why.removesuffix('"}\n\n')))
                yield f"data: {json.dumps(error)}\n\n"
                return
        yield "data: [DONE]\n\n"
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]
