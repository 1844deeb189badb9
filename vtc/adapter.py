"""What vtc has to know about a model family, and the registry that finds it.

A family is one file in `integrations/`: a subclass of `Adapter` under `@register`. Nothing in `vtc` names a family.
What stands here is right for a tower like CLIP's or SigLIP's before a decoder like Llama's; families override the rest.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from transformers import AutoImageProcessor

from vtc.attention import Attention, TowerStates
from vtc.grids import Grid
from vtc.stage import Shape

HfModule = Any  # a module of a Hugging Face model, whose attributes no type checker knows
ADAPTERS: dict[str, type[Adapter]] = {}


class Adapter:
    """Where one family keeps its parts. Attributes are looked up on the live model, never copied."""

    model_types: ClassVar[tuple[str, ...]]
    """Values of `config.model_type` that this adapter serves."""
    has_pixels: ClassVar[bool] = True
    """Whether `pixels` can tell the pixels of each patch."""
    joins_tiles: ClassVar[bool] = False
    """Whether features come tile by tile, and tiles whose placeholders touch are one image."""
    merges_patches: ClassVar[bool] = False
    """Whether patches may be merged between the tower's blocks: they take (hidden, mask), and tokens are patches."""
    window_cuts_blocks: ClassVar[bool] = True
    """Whether a sliding window also limits what a token sees of its own block (see `blocks`)."""

    def __init__(self, model: HfModule):
        self.model = model

    # -- the decoder ----------------------------------------------------------------------------------------------

    @property
    def backbone(self) -> HfModule:
        """The module that has `get_image_features` and merges image features into the text sequence."""
        return self.model.base_model

    @property
    def decoder(self) -> HfModule:
        """The text model: takes `inputs_embeds` and runs `layers`."""
        return self.backbone.language_model

    @property
    def layers(self) -> Sequence[HfModule]:
        """The decoder layers."""
        return self.decoder.layers

    @property
    def image_token_id(self) -> int:
        return self.model.config.image_token_id

    def placeholders(self) -> dict[str, int]:
        """The token that stands for visual tokens in a prompt, by modality: "image", and "video" where there is one."""
        films = hasattr(self.backbone, "get_video_features")
        return {"image": self.image_token_id} | ({"video": self.model.config.video_token_id} if films else {})

    def decoder_attention(self, layer: HfModule) -> Attention:
        """The attention parts of one decoder layer."""
        attention, config = layer.self_attn, self.decoder.config
        heads = config.num_attention_heads, config.num_key_value_heads
        norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        softcap = getattr(attention, "attn_logit_softcapping", None)
        return Attention(attention.q_proj, attention.k_proj, *heads, attention.scaling, *norms, softcap)

    def window(self, layer: HfModule) -> int | None:
        """How many positions back a decoder layer sees; None where it sees all."""
        return getattr(layer.self_attn, "sliding_window", getattr(self.decoder.config, "sliding_window", None))

    def branches(self, layer: HfModule) -> dict[str, HfModule]:
        """The modules of one decoder layer whose outputs are what goes into and comes out of its two residual branches.

        Where the layer normalises what comes out, too, that is what is added to the residual.
        """
        if hasattr(layer, "pre_feedforward_layernorm"):
            names = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
        else:
            names = "input_layernorm self_attn post_attention_layernorm mlp"
        labels = ("attention in", "attention out", "feed-forward in", "feed-forward out")
        return {label: getattr(layer, name) for label, name in zip(labels, names.split(), strict=True)}

    def rotary_tables(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (batch or 1, length, head_dim) of decoder layer 0, for positions (..., batch, length)."""
        return self.decoder.rotary_emb(hidden, positions)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of (batch, heads, length, head_dim) by (batch, length, head_dim), half-split convention."""
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    def blocks(self, inputs: dict[str, Any]) -> Tensor | None:
        """(batch, length) int64: tokens with the same number >= 0 see each other both ways; None: all is causal.

        `inputs` are the backbone's keyword arguments.
        """
        return None

    def late_features(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """Take what the decoder would add to its states after its first layers out of its keyword arguments.

        Returns those without it, and for each of these layers (batch, length, width).
        """
        return kwargs, []

    # -- the vision tower -----------------------------------------------------------------------------------------

    def encoder_blocks(self) -> Sequence[HfModule]:
        """All blocks of the vision tower."""
        return self.backbone.vision_tower.encoder.layers

    def tower_blocks(self) -> Sequence[HfModule]:
        """The vision tower's blocks that can be scored by, the last being the one whose output the projector reads."""
        return self.encoder_blocks()[: self._last_read()]

    def unread_blocks(self, call: dict[str, Any]) -> Sequence[HfModule]:
        """The tower's blocks whose outputs no one asks for in this call of `get_image_features`; they are not run."""
        asked = call.get("vision_feature_layer") not in (None, self._feature_setting("vision_feature_layer", None))
        if asked or call.get("output_hidden_states") or call.get("output_attentions"):
            return ()
        return self.encoder_blocks()[self._last_read() :]

    def _last_read(self) -> int:
        """How many of the tower's blocks it takes to make what the projector reads."""
        blocks, read = len(self.encoder_blocks()), self._feature_setting("vision_feature_layer", -1)
        # hidden_states[i] is the output of block i - 1; several layers may be read and concatenated
        return max(layer % (blocks + 1) for layer in ([read] if isinstance(read, int) else read))

    def has_cls(self) -> bool:
        """Whether token 0 of the tower's sequence is a CLS token that the projector does not read."""
        return self._feature_setting("vision_feature_select_strategy", "full") == "default"

    def _feature_setting(self, name: str, default: Any) -> Any:
        """An entry of the config, where the family's encoder takes it as an argument: others do not read theirs."""
        takes = inspect.signature(type(self.backbone).get_image_features).parameters
        return getattr(self.model.config, name, default) if name in takes else default

    def tower_attention(self, block: HfModule) -> Attention:
        """The attention parts of one tower block."""
        attention = block.self_attn
        return Attention(attention.q_proj, attention.k_proj, attention.num_heads, attention.num_heads, attention.scale)

    def tower_modules(self, block: HfModule) -> dict[str, HfModule]:
        """The modules whose outputs `tower_states` needs, by name."""
        attention = self.tower_attention(block)
        return {"query": attention.query, "key": attention.key}

    def tower_states(self, block: HfModule, record: dict[str, Any], call: dict[str, Any]) -> TowerStates:
        """Queries and keys of one tower block, from the outputs of `tower_modules` and the encoder's arguments."""
        attention = self.tower_attention(block)
        return TowerStates(attention.queries(record["query"]), attention.keys(record["key"]), attention.scale)

    def patches(self, states: Tensor, call: dict[str, Any]) -> Tensor:
        """The patches of a tower block's output: (crops, patches, width). `call` as in `pack`."""
        return states[:, int(self.has_cls()) :]

    def pack(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        """From a map over the tower's patches, (crops, patches, channels), to (tokens, channels) of each image.

        The model's own way from patches to visual tokens: groups that are merged become their mean.
        `call` holds the arguments of `get_image_features` or `get_video_features`.
        """
        return list(patches)

    def parts(self, call: dict[str, Any], sizes: list[int]) -> list[list[Grid]]:
        """The grids that the `sizes` tokens of each image form, in token order: tiles, frames."""
        return [[self.grid(size)] for size in sizes]

    def pixels(self, call: dict[str, Any]) -> Tensor:
        """The pixels of the tower's patches: (crops, patches, channels, pixels)."""
        pixels, size = call["pixel_values"], self.patch_size()
        return rearrange(pixels, "i c (h p) (w q) -> i (h w) c (p q)", p=size, q=size)

    @functools.cached_property
    def image_processor(self) -> Any | None:
        """The image processor that lies beside the model's checkpoint; None where there is none on this machine."""
        checkpoint = getattr(self.model.config, "_name_or_path", "")
        try:
            return AutoImageProcessor.from_pretrained(checkpoint, local_files_only=True) if checkpoint else None
        except (OSError, ValueError, ImportError):
            return None

    def patch_size(self) -> int:
        """Pixels on the side of the tower's patches."""
        return self.model.config.vision_config.patch_size

    def tokens_per_image(self) -> int | None:
        """Visual tokens of an image where the family fixes that number, else None."""
        return None

    def grid(self, tokens: int) -> Grid:
        """(height, width) of the grid of an image or a tile with this many tokens."""
        side = round(tokens**0.5)
        if side * side != tokens:
            raise ValueError(f"{tokens} visual tokens are not a square grid, and {type(self).__name__} names no other")
        return side, side

    def shape(self) -> Shape:
        heads, config = self.decoder_attention(self.layers[0]).key_heads, self.decoder.config
        channels = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers, blocks, bits = len(self.layers), len(self.tower_blocks()), 8 * self.model.dtype.itemsize
        return Shape(layers, blocks, self.has_cls(), heads, channels, bits)


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: serve `adapter.model_types`."""
    ADAPTERS.update(dict.fromkeys(adapter.model_types, adapter))
    return adapter


@functools.cache
def _load_families() -> None:
    """Import the files of `integrations/`, and what other packages name in the entry-point group `vtc.integrations`."""
    import vtc.integrations

    for module in pkgutil.iter_modules(vtc.integrations.__path__):
        importlib.import_module(f"vtc.integrations.{module.name}")
    for entry in entry_points(group="vtc.integrations"):
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise ImportError(f"the family {entry.name!r} ({entry.value}): {error}") from error


def find(model: HfModule) -> Adapter:
    """The adapter for `model`, by `config.model_type`. Raises a TypeError that names the known families."""
    _load_families()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ADAPTERS:
        raise TypeError(
            f"vtc has no adapter for {type(model).__name__} (model_type {model_type!r}). Families it knows: "
            f"{', '.join(sorted(ADAPTERS))}. To add one, write a file like integrations/llava.py"
        )
    return ADAPTERS[model_type](model)
