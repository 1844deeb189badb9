"""Continuous batching of transformers, with visual rows and original positions.

This is the one file that uses private parts of transformers; `tests/test_serve_parts.py` names each of them.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import ContinuousBatchingConfig
from transformers.cli.serving.utils import CBGenerateManager, CBWorkerDeadError, GenerationState
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import drain_queue

from vtc.core.patch import Patch, around
from vtc.serve.limits import Sizes
from vtc.serve.memory import Memory
from vtc.serve.prompt import Prompt
from vtc.serve.ticket import Ticket


class Engine(ContinuousBatchingManager):
    """Runs prompts of one model, packed into common batches."""

    def __init__(self, model: Any, memory: Memory, config: ContinuousBatchingConfig):
        shared = _shared(model)
        shared.register_forward_pre_hook(self._embed, with_kwargs=True)
        generation = copy.deepcopy(model.generation_config)
        generation.do_sample = False
        super().__init__(shared, generation, config)
        self._memory = memory
        self.prompts: dict[str, Prompt] = {}
        """Of the requests that are not over."""
        self._leaving: deque[str] = deque()

    # -- requests -------------------------------------------------------------------------------------------------

    def add_request(self, prompt: Prompt, request_id: str, **options: Any) -> str:  # type: ignore[override]
        """Queue a prompt. Raises CBWorkerDeadError where nobody would ever look at it."""
        self.prompts[request_id] = prompt
        options |= {"record_timestamps": True}
        if super().add_request(prompt.ids, request_id=request_id, **options) is None:
            raise CBWorkerDeadError("the engine has stopped")
        return request_id

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], None]) -> None:
        def delivered(output: GenerationOutput) -> None:
            if isinstance(request_id, Ticket):
                if request_id.first is None and output.timestamps:
                    request_id.first = output.timestamps[0]
                request_id.ended = any(token in request_id.ends for token in output.generated_tokens[-1:])
            if output.is_finished():  # it is in no batch any more, and its client may ask again once it is called
                self._release(request_id)
            callback(output)

        super().register_result_handler(request_id, delivered)

    def cancel_request(self, request_id: str) -> None:
        """Deliver nothing more, and give blocks and images back."""
        super().cancel_request(request_id)
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)
        self._leaving.append(request_id)  # behind the cancellation: what is not scheduled now never will be

    def _release(self, request_id: str) -> None:
        """Give the images of a request back that is over; harmless where they are back."""
        if (prompt := self.prompts.pop(request_id, None)) is not None:
            for kept in prompt.images:
                self._memory.release(kept)

    def reason(self) -> str | None:
        """Why answers of this model would differ here; None where they would not."""
        processors = self.model._get_logits_processor(self.generation_config)
        unknown = [type(one).__name__ for one in processors if one.supports_continuous_batching is not True]
        return f"its generation config asks for {', '.join(unknown)}" if unknown else None

    def blocks_in_use(self) -> int:
        """Blocks of the cache that requests hold; those that wait to be shared are not counted."""
        if self.batch_processor is None:
            return 0
        held = (allocator.block_table for allocator in self.batch_processor.cache.cache_allocators.values())
        return sum(len(blocks) for table in held for blocks in list(table.values()))

    # -- the engine's thread --------------------------------------------------------------------------------------

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        inputs = processor.inputs_and_outputs
        Patch(inputs, "prepare_batch_tensors", around(inputs.prepare_batch_tensors, self._prepare, inputs))
        return processor

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        leaving = [self._leaving.popleft() for _ in range(len(self._leaving))]  # those whose cancellation is seen below
        goes_on = super()._generation_loop_body(batch_processor, bootstrapping)
        scheduler = batch_processor.scheduler
        if not scheduler.active_requests:  # a full cache lets nobody new in until one finishes: all may have left
            scheduler.block_new_requests = False
        for request in leaving:
            if request in scheduler.active_requests or request in scheduler.waiting_requests:
                self.cancel_request(request)  # upstream looks at what is new first: both came between its two looks
            else:
                self._release(request)
        if leaving:  # what a step still had for them, nobody reads
            unread = self.output_router.output_queue
            for output in drain_queue(unread):
                if output.request_id in self.prompts:
                    unread.put(output)
        return goes_on

    def _prepare(self, inputs: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """The next batch as stock code makes it, and over it where each row is in memory and its original position."""
        original(*args, **kwargs)
        positions, start = [], 0
        for future in inputs.requests_in_batch:
            end, count = start + future.query_length, future.state.position_offset
            past, prompt = count - future.query_length, self.prompts[future.state.request_id]
            if past < len(prompt.ids):
                read = prompt.read[past:count]
                inputs.input_ids[start : start + len(read)] = read.to(inputs.input_ids.device)
                positions.append(prompt.positions[past:count])
                past += len(read)
            positions.append(torch.arange(past + prompt.shift, count + prompt.shift, dtype=torch.int32))
            start = end
        inputs.position_ids[:start] = torch.cat(positions).to(inputs.position_ids.device)

    def _embed(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Embeddings of text, and rows of images."""
        ids, first = kwargs.pop("input_ids"), self._memory.vocabulary
        text = model.get_input_embeddings()(ids.clamp(max=first - 1))  # type: ignore[operator]
        rows = self._memory.rows[(ids - first).clamp(min=0)]
        kwargs["inputs_embeds"] = torch.where((ids >= first)[..., None], rows, text)
        return args, kwargs


def _shared(model: Any) -> Any:
    """The same weights in modules of their own: paged attention there, and the wrapped model's hooks here."""
    if getattr(model, "hf_device_map", None) and len({*model.hf_device_map.values()}) > 1:
        raise ValueError("a served model lies on one device; for several, start one server on each")
    weights = {id(weight): weight for weight in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, weights)


def batching(sizes: Sizes) -> ContinuousBatchingConfig:
    """What the engine holds. CUDA graphs are off: nobody has tried whether they record what `Engine` adds."""
    return ContinuousBatchingConfig(
        page_size=sizes.page,
        num_blocks=sizes.cache // sizes.page,
        max_batch_tokens=sizes.batch,
        max_requests_per_batch=sizes.requests,
        use_cuda_graph=False,
        use_async_batching=False,
    )


class Packed(CBGenerateManager):
    """Hands requests to the engine. Their `inputs` have a `Prompt` under "prompt"."""

    def __init__(self, engine: Engine):
        super().__init__()
        self._cb = self.engine = engine

    def generate_streaming(self, model: Any, processor: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        handlers, request = self.engine.output_router.result_handlers, kwargs["request_id"]

        def delivered(output: GenerationOutput) -> None:  # in the loop, where it is known by then who is to be called
            if request in handlers:
                handlers[request][0](output)

        self.engine.register_result_handler(request, delivered)  # upstream does so once the engine may have answered
        return super().generate_streaming(model, processor, {"input_ids": inputs["prompt"]}, *args, **kwargs)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """Raises CBWorkerDeadError also where the engine dies meanwhile: it fails requests before it says so."""
        try:
            return await super().generate_non_streaming(
                model, processor, {"input_ids": inputs["prompt"]}, *args, **kwargs
            )
        except RuntimeError as error:
            if self.engine.background_thread_status.can_accept_new_requests() is not None:
                raise CBWorkerDeadError(str(error)) from error
            raise


class State(GenerationState):
    """What `/health` asks."""

    def __init__(self, packed: Packed):
        super().__init__(continuous_batching=True)
        self._cb_manager = self.packed = packed
