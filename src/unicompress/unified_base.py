"""The joined parts of a unified model, and what they make of an image and of a text."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unicompress.backbones.causal_lm import CausalLM
from unicompress.backbones.projectors import projectors
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import InputError
from unicompress.sequence import ImageLayout
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.unified_parts import UnifiedConfig, build_lm, code_space


class UnifiedBase(PreTrainedModel):
    """Holds the parts; tokenizer and codec are frozen and keep evaluation mode and precision."""

    config_class = UnifiedConfig
    main_input_name = "pixels"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: UnifiedConfig,
        *,
        tokenizer: ImageTokenizer | None = None,
        codec: ImageCodec | None = None,
        lm: PreTrainedModel | None = None,
        text_tokenizer: PreTrainedTokenizerFast | None = None,
    ):
        super().__init__(config)
        if tokenizer is None:
            tokenizer = tokenizers.build(config.tokenizer)
        if codec is None and config.codec is not None:
            codec = ImageCodec(tokenizer, CodecSpec.from_dict(config.codec))
        if lm is None:
            lm = build_lm(config)
        self.text_tokenizer = text_tokenizer
        self.tokenizer = tokenizer
        self.codec = codec
        quantized = config.understanding_source == "quantized"
        self.backbone = CausalLM(
            lm=lm,
            space=code_space(config.text_size, tokenizer, codec),
            projector=projectors.build(
                config.projector,
                dim=tokenizer.spec.code_dim if quantized else tokenizer.spec.dim,
                hidden=lm.get_input_embeddings().embedding_dim,
            ),
        )
        self.tokenizer.requires_grad_(False)
        if self.codec is not None:
            self.codec.requires_grad_(False)
        self.post_init()
        self.train(self.training)

    # The image's share of the sequence

    @property
    def layout(self) -> ImageLayout:
        """Places of one image's tokens (eq. 5)."""
        grid = self.tokenizer.spec.grid
        if self.codec is None:
            return ImageLayout(0, grid)
        return ImageLayout(self.codec.spec.global_count, grid.pooled(self.codec.spec.stride))

    @property
    def tokens_per_image(self) -> int:
        """Image tokens without delimiters: 256 dense, 68 compressed in the default setting."""
        return self.layout.tokens

    @property
    def interface_tokens(self) -> int:
        """Positions that an image takes in the language model, delimiters included."""
        return self.layout.length

    @property
    def lm(self) -> Any:
        """The language model (PreTrainedModel); assign to it to put an adapter around it."""
        return self.backbone.lm

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would register a module under the property's name and leave the backbone as it is.
        if name == "lm":
            self.backbone.lm = value
        else:
            super().__setattr__(name, value)

    def use_decompressor(self, codec: ImageCodec) -> None:
        """Take over the decompressor of a plug-in that was refined after this model was trained.

        Raises InputError unless all that the codes depend on is equal, since the language model
        writes these codes.
        """
        if self.codec is None or codec.spec != self.codec.spec:
            raise InputError("only the same plug-in, trained further, can replace this model's")
        own, other = self.codec.state_dict(), codec.state_dict()
        for name, tensor in own.items():
            if not name.startswith("decompressor.") and not torch.equal(tensor, other[name]):
                raise InputError(
                    f"the plug-in differs in {name}, so its codes mean something else to this "
                    "language model: refine the plug-in that it was trained with"
                )
        self.codec.load_state_dict(other)

    def encode_image(
        self, pixels: Float[Tensor, "b 3 h w"] | Float[Tensor, "b t d"]
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n c"]]:
        """What understanding reads and what generation must write, globals first.

        Takes pixels in [-1, 1], or the tokenizer's dense tokens X if they have been computed.
        """
        dense = self._dense(pixels)
        return self._features(dense), self._codes(dense)

    @torch.no_grad()
    def _dense(self, images: Tensor) -> Float[Tensor, "b t d"]:
        spec = self.tokenizer.spec
        height, width = (spec.image_size // spec.grid.rows * side for side in spec.grid)
        pixels = tuple(images.shape[1:]) == (3, height, width)
        if not pixels and tuple(images.shape[1:]) != (spec.grid.length, spec.dim):
            raise InputError(
                f"images must have shape [batch, 3, {height}, {width}], got {list(images.shape)}: "
                "resize them first"
            )
        if not len(images) or not images.is_floating_point():
            raise InputError(
                "images must be at least one picture of floats in [-1, 1], got "
                f"{list(images.shape)} of {images.dtype}"
            )
        images = images.to(self.tokenizer.device, next(self.tokenizer.parameters()).dtype)
        with self._exact():
            return self.tokenizer.encode(images) if pixels else images

    @torch.no_grad()
    def _features(self, images: Tensor) -> Float[Tensor, "b n d"]:
        dense = self._dense(images)
        quantized = self.config.understanding_source == "quantized"
        with self._exact():
            if self.codec is None:
                return self.tokenizer.quantize(dense)[1] if quantized else dense
            tokens = self.codec.compress(dense)
            return self.codec.quantize(tokens)[1] if quantized else tokens.sequence

    @torch.no_grad()
    def _codes(self, images: Tensor) -> Int[Tensor, "b n c"]:
        dense = self._dense(images)
        with self._exact():
            if self.codec is None:
                return self.tokenizer.quantize(dense)[0]
            return self.codec.quantize(self.codec.compress(dense))[0]

    def _exact(self) -> torch.autocast:
        """No autocast: rounding would turn codes into others."""
        return torch.autocast(self.tokenizer.device.type, enabled=False)

    def _image_embeds(self, images: Tensor) -> Float[Tensor, "b l h"]:
        """The image as understanding sees it, after the text's own start token if it has one."""
        layout = self.layout
        features = self._features(images).to(next(self.backbone.projector.parameters()).dtype)
        globals_, locals_ = features.split([layout.global_count, layout.local_count], dim=1)
        projected = self.backbone.embed_features(globals_, locals_, layout.grid)
        delimiters = self.backbone.delimiters()
        embeds = layout.arrange(delimiters, projected.to(delimiters))  # autocast may have narrowed
        start = torch.tensor([self._start()], dtype=torch.long, device=embeds.device)
        opening = self.backbone.embed_text(start.expand(len(embeds), -1))
        return torch.cat([opening.to(embeds), embeds], dim=1)

    # Text

    @property
    def text(self) -> PreTrainedTokenizerFast:
        """The text tokenizer; raises InputError where the model was built without one."""
        if self.text_tokenizer is None:
            raise InputError("this model has no text tokenizer: build it with text_tokenizer=...")
        return self.text_tokenizer

    def _start(self) -> list[int]:
        start = self.text.bos_token_id
        return [] if start is None else [start]

    def _ids(self, text: str) -> list[int]:
        return self.text(text, add_special_tokens=False)["input_ids"]

    def _question_ids(self, question: str) -> list[int]:
        """Question and line break as separate tokens, so that the answer never merges with them."""
        return self._ids(question) + self._ids("\n")

    def _caption_ids(self, caption: str) -> list[int]:
        return [*self._start(), *self._ids(caption)]

    def _end(self) -> int:
        end = self.text.eos_token_id
        if end is None:
            raise InputError("the text tokenizer has no end token: set its eos_token")
        return int(end)

    def _check_length(self, needed: int, what: str) -> None:
        limit = self.backbone.max_positions
        if needed > limit:
            raise InputError(
                f"{what} needs {needed} positions, the language model has {limit}: shorten the text"
            )

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Projector, language model, special embeddings and depth heads, unless switched off."""
        return (p for p in self.backbone.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> "UnifiedBase":
        """Switch the trained parts; tokenizer and codec stay in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        if self.codec is not None:
            self.codec.eval()
        return self

    def init_weights(self) -> None:
        """Nothing: every part has initialised itself."""
