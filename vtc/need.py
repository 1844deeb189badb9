"""Something to be seen of the running model: it names modules, whose outputs hooks keep, and makes a row of them."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Need:
    """Something to be seen of block `layer`, of the vision tower or of the decoder."""

    layer: int

    tower: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    """Whether the row depends on the text of the prompt."""
    changes: ClassVar[bool] = False
    """Whether its hooks also change what the tower makes of an image."""

    @property
    def before(self) -> int:
        """The decoder layer before which the row is made; the tokens must not have changed since it was observed."""
        return self.layer + 1

    def modules(self, adapter: Any) -> dict[str, nn.Module]:
        """The modules to hook, by the names under which `record` will hold their outputs.

        Raises ValueError where the model has no such thing.
        """
        raise NotImplementedError

    def hooks(self, adapter: Any) -> list[RemovableHandle]:
        """Hook the modules, so that the running call's record gets their outputs."""
        return [
            module.register_forward_hook(partial(self._keep, name)) for name, module in self.modules(adapter).items()
        ]

    def _keep(self, name: str, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        if (record := self.record()) is not None:
            record[name] = output

    def record(self) -> dict[str, Any] | None:
        """Where the running call keeps what is seen for this need; None where it has not asked for it."""
        return (recording.get() or {}).get(self)

    def row(self, record: dict[str, Any], context: Any) -> Tensor:
        """What was seen, float32: (crops, channels, patches) of a tower, (images, channels, tokens) of a decoder.

        `context` is the `Tower` of the one, the `View` of the other.
        """
        raise NotImplementedError


Record = dict[Need, dict[str, Any]]
recording: ContextVar[Record | None] = ContextVar("vtc_recording", default=None)
"""Where the hooks write: an entry for each need of the running call. Another thread on the same model has its own."""
