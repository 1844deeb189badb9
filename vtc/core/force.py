"""Which compression is in force: for good by `wrap`, for one thread's block by `compressed`, for a whole generate()."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vtc.core.call import Prompt
from vtc.core.compression import Compression
from vtc.stage import Budget, Method
from vtc.trace import Trace

chosen: ContextVar[tuple[Compression, ...]] = ContextVar("vtc_chosen", default=())
"""What `compressed` and running generate() calls put in force in this context, on any model; the last one counts."""
prompted: ContextVar[tuple[Any, Prompt] | None] = ContextVar("vtc_prompted", default=None)
"""The model whose generate() is running, and its prompt: what is longer was guessed."""
changed = threading.Condition()
"""Held while anything here changes, and told when a call ends."""


class InForce:
    """The compressions of one model. Whoever begins a call finds the one that is its own."""

    def __init__(self) -> None:
        self._lasting: Compression | None = None
        """What `wrap` put in force: for every thread that has not chosen itself."""
        self._passing: list[Compression] = []
        """What `compressed` put in force: each for its own context."""

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: what is in force here and now is in force there for good."""
        return {**vars(self), "_lasting": self.compression, "_passing": []}

    @property
    def compression(self) -> Compression:
        """What is in force in this context."""
        own = [one for one in chosen.get() if one in self.compressions]
        return own[-1] if own else self._lasting or self._passing[-1]

    @property
    def method(self) -> Method:
        return self.compression.method

    @property
    def budget(self) -> Budget | None:
        return self.compression.budget

    @property
    def trace(self) -> Trace:
        return self.compression.trace

    @property
    def compressions(self) -> list[Compression]:
        """All that are in force anywhere."""
        return [*self._passing, *([] if self._lasting is None else [self._lasting])]

    def update(self) -> None:
        """Bring what hangs on the model in line with what is in force."""
        raise NotImplementedError

    def fits(self) -> bool:
        """Whether what hangs on the model is where it runs: PEFT replaces modules."""
        raise NotImplementedError

    def busy(self) -> bool:
        """Whether another thread runs a call under what `wrap` put in force."""
        return self._lasting is not None and not self._lasting.running <= {threading.get_ident()}

    def replace(self, compression: Compression | None) -> None:
        """Put in force what `wrap` made; None: nothing. Raises RuntimeError inside a generate() of this model."""
        if self.generates():
            raise RuntimeError("this model's generate() is running: wrap or unwrap the model when it has returned")
        with changed:
            self._lasting = compression
            self.update()

    def enter(self, compression: Compression) -> None:
        """Put in force what `compressed` made."""
        with changed:
            self._passing.append(compression)
            self.update()
        chosen.set((*chosen.get(), compression))

    def leave(self, compression: Compression) -> None:
        """The end of its block; waits for calls of threads that run in a copy of this context."""
        chosen.set(tuple(other for other in chosen.get() if other is not compression))
        with changed:
            changed.wait_for(lambda: compression.running <= {threading.get_ident()})
            self._passing.remove(compression)
            self.update()

    def begin(self, sees: bool) -> Compression:
        """The compression of a call that begins; with `sees` it brings images.

        Raises RuntimeError for images of a thread that has chosen nothing, where others have.
        """
        with changed:
            compression = self.compression
            if sees and compression in self._passing and compression not in chosen.get():
                raise RuntimeError(
                    "another thread has this model in vtc.compressed, and this one has chosen nothing: open "
                    "vtc.compressed in the thread that calls the model, or run it in a copy of the context "
                    "(contextvars.copy_context().run)"
                )
            if (sees or (compression.selects and not self.generates())) and not self.fits():
                self.update()
            compression.running.add(threading.get_ident())
        return compression

    def end(self, compression: Compression) -> None:
        """The end of a call; one inside generate() is a part of that."""
        if not self.generates():
            with changed:
                compression.running.discard(threading.get_ident())
                changed.notify_all()

    @contextmanager
    def generating(self, prompt: Prompt, sees: bool) -> Iterator[None]:
        """A generate() of a prompt: what is in force when it begins is so to its end."""
        compression = self.begin(sees)
        tokens = chosen.set((*chosen.get(), compression)), prompted.set((self, prompt))
        try:
            yield
        finally:
            chosen.reset(tokens[0])
            prompted.reset(tokens[1])
            self.end(compression)

    def generates(self) -> bool:
        """Whether this is called inside generate()."""
        return (running := prompted.get()) is not None and running[0] is self

    def prompt(self) -> Prompt | None:
        """The prompt of the running generate(); None outside of one."""
        running = prompted.get()
        return running[1] if running is not None and running[0] is self else None
