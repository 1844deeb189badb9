"""Images that arrive together go through the vision tower together, and each one once."""

from __future__ import annotations

import copy
import queue
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from typing import Any

from PIL.Image import Image

import vtc.adapter as adapters
from vtc.serve.encode import Alone, Pruned, Spend, prune
from vtc.serve.memory import Kept, Memory

REASONS = 1000
"""How many methods with budgets are remembered that cannot be packed: clients name what they like."""


class Tower:
    """Prunes images in a thread of its own: whatever waits with the same method and budget, at once."""

    def __init__(self, model: Any, processor: Any, memory: Memory, together: int):
        self.model, self.memory, self.together = model, memory, together
        self.processor = copy.deepcopy(processor)  # tokenizers hold settings of the running call: one for each thread
        self.adapter = adapters.find(model)
        self.runs = 0
        """How often images went through the tower."""
        self._reasons: OrderedDict[Spend, str] = OrderedDict()
        self._waiting: dict[Hashable, list[Future[Kept]]] = {}
        self._jobs: queue.SimpleQueue[tuple[Hashable, Image, Spend] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="vtc-tower", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=10)

    def submit(self, image: Image, digest: bytes, spend: Spend) -> Future[Kept]:
        """The image in memory, for one more user; or what was in the way."""
        key, future = (digest, spend), Future[Kept]()
        with self._lock:
            if spend in self._reasons:
                future.set_exception(Alone(self._reasons[spend]))
            elif (kept := self.memory.find(key)) is not None:
                future.set_result(kept)
            elif key in self._waiting:
                self._waiting[key].append(future)
            else:
                self._waiting[key] = [future]
                self._jobs.put((key, image, spend))
        return future

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            batch, groups = [first], dict[Spend, list[tuple[Hashable, Image]]]()
            while len(batch) < self.together and not self._jobs.empty():
                if (more := self._jobs.get()) is None:
                    return
                batch.append(more)
            for key, image, spend in batch:
                if self._wanted(key):
                    groups.setdefault(spend, []).append((key, image))
            for spend, images in groups.items():
                self._prune(images, spend)

    def _wanted(self, key: Hashable) -> bool:
        """Whether somebody still waits for an image; where all have left, who comes now asks anew."""
        with self._lock:
            if all(future.cancelled() for future in self._waiting[key]):
                del self._waiting[key]
                return False
            return True

    def _prune(self, images: Sequence[tuple[Hashable, Image]], spend: Spend) -> None:
        try:
            self.runs += 1
            found = prune(self.model, self.adapter, self.processor, [image for _, image in images], spend)
        except Exception as error:
            if isinstance(error, Alone):
                with self._lock:
                    self._reasons[spend] = str(error)
                    if len(self._reasons) > REASONS:
                        self._reasons.popitem(last=False)
            elif len(images) > 1:  # of these one may be at fault
                for image in images:
                    self._prune([image], spend)
                return
            for key, _ in images:
                self._fail(key, error)
            return
        for (key, _), pruned in zip(images, found, strict=True):
            self._remember(key, pruned)

    def _remember(self, key: Hashable, pruned: Pruned) -> None:
        try:
            with self._lock:
                kept = self.memory.add(key, pruned)
                futures = self._waiting.pop(key)
                for _ in futures[1:]:
                    self.memory.find(key)
        except Exception as error:
            return self._fail(key, error)
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_result(kept)
            else:
                self.memory.release(kept)
        return None

    def _fail(self, key: Hashable, error: Exception) -> None:
        with self._lock:
            futures = self._waiting.pop(key, [])
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
