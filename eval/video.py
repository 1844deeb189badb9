"""Frames of a video file, as processors of models that read videos take them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Video(NamedTuple):
    frames: np.ndarray
    """(frames, height, width, 3) uint8."""
    metadata: Any
    """transformers' `VideoMetadata`: where in time these frames lie."""


def read(path: str | Path, frames: int, start: float | None = None, end: float | None = None) -> Video:
    """At most `frames` frames, evenly spaced from second `start` to second `end` of a local file, both included.

    Raises ValueError for a file that does not say how many frames it has, and for a part of it without any; what PyAV
    raises for one that it cannot read.
    """
    import numpy as np
    from transformers.video_utils import load_video

    if "://" in str(path):
        raise ValueError(f"{path}: videos are read from local files only")

    def chosen(metadata: Any, **_: Any) -> list[int]:
        first = round((start or 0.0) * (metadata.fps or 0.0))
        last = metadata.total_num_frames - 1
        last = last if end is None else min(last, round(end * (metadata.fps or 0.0)))
        if not 0 <= first <= last:
            raise ValueError(f"{path}: no frames from second {start or 0} to {'its end' if end is None else end}")
        return sorted({*np.linspace(first, last, frames).round().astype(int).tolist()})

    return Video(*load_video(str(path), sample_indices_fn=chosen, backend="pyav"))
