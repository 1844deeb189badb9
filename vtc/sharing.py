"""One image, many questions: what they have in common is encoded, pruned and prefilled once.

>>> shared = vtc.prefix(model, **processor(images=image, text="USER: <image>\\n", return_tensors="pt"))
>>> for question in questions:
...     ids = processor.tokenizer(prompt_with(question), return_tensors="pt")  # <image> as often as it has tokens
...     model.generate(**ids, past_key_values=copy.deepcopy(shared))
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from vtc.adapter import Adapter
from vtc.core.call import modalities
from vtc.wrapping import hooks_of


@torch.no_grad()
def prefix(model: nn.Module, **inputs: Any) -> transformers.Cache:
    """The pruned cache of a beginning that prompts share, to be deep-copied for each of them.

    Args:
        model: a wrapped model whose method drops before the decoder, and so by the image alone.
        inputs: the beginning as the model takes it, with its images. A prompt that goes on from it has the same ids.

    Returns:
        The cache. `generate` takes a copy of it as `past_key_values`, the ids of the whole prompt, and no image.
        Qwen-VL models keep the positions of the latest image on the module: one prefix at a time.

    Raises:
        ValueError: the model is not wrapped, or its tokens do not depend on the image alone: the method has stages
            inside the decoder or looks at the question, or the text of a prompt is read by its image (PaliGemma).
    """
    if (hooks := hooks_of(model)) is None:
        raise ValueError("wrap the model first: vtc.wrap(model, 'vtc-cls', budget=0.25)")
    compression = hooks.compression
    if late := [stage.site for stage in compression.stages if stage.site != 0]:
        raise ValueError(
            f"{compression.method.name} drops before decoder layers {late}, where the question matters: prompts can "
            "share what a method does before the decoder only, such as vtc-cls, tome or uniform"
        )
    if compression.reads_text:
        raise ValueError(f"{compression.method.name} chooses by the question, which is not in what prompts share")
    if _image_reads_text(hooks.adapter, inputs):
        raise ValueError("the image of this model reads the question: prompts have no beginning that is the same")
    cache: transformers.Cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    return cache


def _image_reads_text(adapter: Adapter, inputs: dict[str, Any]) -> bool:
    if (blocks := adapter.blocks(inputs)) is None:
        return False
    visual = torch.stack(list(modalities(adapter, inputs).values())).any(0)
    return bool((blocks[~visual] >= 0).any())
