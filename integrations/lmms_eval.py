"""lmms-eval: makes the model `vtc` known to it, through the entry point in pyproject.toml.

    python -m lmms_eval --model vtc --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=vtc-cls,budget=64 ...

Nothing of lmms-eval is imported before lmms-eval itself asks for it.
"""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval reads when it starts: the name of the model and where its classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "vtc.eval.suite_model"
    return [ModelManifest(model_id="vtc", chat_class_path=f"{module}.Vtc", simple_class_path=f"{module}.Simple")]
