"""The joined parts of a unified model, and what they make of an image and of a text."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unicompress.backbones.base import Stream, backbones
from unicompress.backbones.projectors import projectors
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import InputError
from unicompress.feature_taps import FeatureTap, taps
from unicompress.sequence import ImageLayout
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokens import EncodedImages, Grid
from unicompress.understanding import PooledTap
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
        tap: FeatureTap | None = None,
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
        self.understanding: PooledTap | None = None
        if tap is None and config.tap is not None:
            tap = taps.build(config.tap)
        if tap is not None:
            self.understanding = PooledTap(tap, **(config.tap_pool or {}))
        quantized = config.understanding_source == "quantized"
        own = tokenizer.spec.code_dim if quantized else tokenizer.spec.dim
        self.backbone: Any = backbones.build(
            config.backbone,
            lm=lm,
            space=code_space(config.text_size, tokenizer, codec, config.backbone),
            projector=projectors.build(
                config.projector,
                dim=own if tap is None else tap.spec.dim,
                hidden=lm.get_input_embeddings().embedding_dim,
            ),
        )
        self.accelerate(config.accelerators)
        self.tokenizer.requires_grad_(False)
        if self.codec is not None:
            self.codec.requires_grad_(False)
        self.post_init()
        self.train(self.training)

    # The image's share of the sequence

    @property
    def layout(self) -> ImageLayout:
        """Places of one image's tokens (eq. 5)."""
        grid, ends = self.tokenizer.spec.grid, self.backbone.row_ends
        if self.codec is None:
            return ImageLayout(0, grid, ends)
        return ImageLayout(self.codec.spec.global_count, grid.pooled(self.codec.spec.stride), ends)

    @property
    def understanding_layout(self) -> ImageLayout:
        """Places of the tokens of an image that is read, maybe by another encoder."""
        if self.understanding is None:
            bare = self.backbone.prompts.bare and self.codec is None
            return replace(self.layout, bare=bare)
        grid = self.understanding.tap.spec.grid.pooled(self.understanding.stride)
        return ImageLayout(self.understanding.global_count, grid)

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

    def accelerate(self, specs: Sequence[str]) -> None:
        """Let the language model's layers treat image tokens as these accelerators say.

        Takes the place of those in use; they are saved with the model. See `accelerators/`.
        """
        if specs or self.config.accelerators:
            self.backbone.accelerate(specs)
        self.config.accelerators = list(specs)

    def use_decompressor(self, codec: ImageCodec) -> None:
        """Take over the decompressor of a plug-in that was refined after this model was trained.

        It may be of another order, head or size. Raises InputError unless all that the codes depend
        on is equal, since the language model writes these codes.
        """
        if self.codec is None or not codec.spec.same_codes(self.codec.spec):
            raise InputError("only the same plug-in, trained further, can replace this model's")
        own, other = self.codec.state_dict(), codec.state_dict()
        for name, tensor in own.items():
            if not name.startswith("decompressor.") and not torch.equal(tensor, other[name]):
                raise InputError(
                    f"the plug-in differs in {name}, so its codes mean something else to this "
                    "language model: refine the plug-in that it was trained with"
                )
        joined = ImageCodec(self.tokenizer, codec.spec).to(next(self.codec.parameters()).dtype)
        joined.load_state_dict(other)
        self.codec = joined.to(self.tokenizer.device).requires_grad_(False).eval()
        self.config.codec = codec.spec.to_dict()

    def embed_stream(self, codes: Int[Tensor, "b n c"], stream: Stream) -> Float[Tensor, "b n e"]:
        """Codes of one stream to the rows that the decompressor, or the host's decoder, reads."""
        if self.codec is None or self.codec.spec.identity:
            return self.tokenizer.embed(codes)
        return self.codec.requantizer.embed(codes, stream, plain=False)

    def encode_image(
        self, pixels: Float[Tensor, "b 3 h w"] | Float[Tensor, "b t d"]
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, "b n c"]]:
        """What understanding reads and what generation must write, globals first.

        Takes pixels in [-1, 1], or the tokenizer's dense tokens X if they have been computed.
        """
        dense = self._dense(pixels)
        return self._features(dense if self.understanding is None else pixels), self._codes(dense)

    @torch.no_grad()
    def _dense(
        self, images: Tensor, host: ImageTokenizer | FeatureTap | None = None
    ) -> Float[Tensor, "b t d"]:
        host = host or self.tokenizer
        spec = host.spec
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
        images = images.to(host.device, next(host.parameters()).dtype)
        with self._exact():
            return host.encode(images) if pixels else images

    def _features(self, images: Tensor | EncodedImages) -> Float[Tensor, "b n d"]:
        if isinstance(images, EncodedImages):
            if self.understanding is not None:
                raise InputError("an encoder that reads by itself needs pixels, not packed images")
            return images.features
        if self.understanding is not None:  # its pooler learns, the rest is frozen
            return self.understanding(self._dense(images, self.understanding.tap))
        return self._shared_features(images)

    @torch.no_grad()
    def _shared_features(self, images: Tensor) -> Float[Tensor, "b n d"]:
        """What understanding and generation have in common: the tokenizer's field."""
        dense = self._dense(images)
        quantized = self.config.understanding_source == "quantized"
        with self._exact():
            if self.codec is None:
                return self.tokenizer.quantize(dense)[1] if quantized else dense
            tokens = self.codec.compress(dense)
            return self.codec.quantize(tokens)[1] if quantized else tokens.sequence

    @torch.no_grad()
    def _codes(self, images: Tensor | EncodedImages) -> Int[Tensor, "b n c"]:
        if isinstance(images, EncodedImages):
            return images.codes
        dense = self._dense(images)
        with self._exact():
            if self.codec is None:
                return self.tokenizer.quantize(dense)[0]
            return self.codec.quantize(self.codec.compress(dense))[0]

    def _exact(self) -> torch.autocast:
        """No autocast: rounding would turn codes into others."""
        return torch.autocast(self.tokenizer.device.type, enabled=False)

    def _image_embeds(self, images: Tensor | EncodedImages) -> Float[Tensor, "b l h"]:
        """The image as understanding sees it, after what opens a prompt (a start token, a role)."""
        layout = self.understanding_layout
        tokens = self._read_codes(images) if self.backbone.reads_codes else self._project(images)
        delimiters = self.backbone.delimiters()
        embeds = layout.arrange(delimiters, tokens.to(delimiters))  # autocast may have narrowed
        opening_ids = self._ids(self.backbone.prompts.opening)
        ids = [*self._start(), *opening_ids, *self._image_ids(layout.grid)]
        start = torch.tensor([ids], dtype=torch.long, device=embeds.device)
        opening = self.backbone.embed_text(start.expand(len(embeds), -1))
        return torch.cat([opening.to(embeds), embeds], dim=1)

    def _project(self, images: Tensor | EncodedImages) -> Float[Tensor, "b n h"]:
        """Features as the language model's input."""
        layout = self.understanding_layout
        features = self._features(images).to(next(self.backbone.projector.parameters()).dtype)
        globals_, locals_ = features.split([layout.global_count, layout.local_count], dim=1)
        return self.backbone.embed_features(globals_, locals_, layout.grid)

    def _read_codes(self, images: Tensor | EncodedImages) -> Float[Tensor, "b n h"]:
        """Codes as the language model's input, embedded as in drawing."""
        layout, codes = self.layout, self._codes(images)
        globals_, locals_ = codes.split([layout.global_count, layout.local_count], dim=1)
        parts = (
            self.backbone.embed_codes(globals_, "global"),
            self.backbone.embed_codes(locals_, "local"),
        )
        return torch.cat(parts, dim=1)

    def _token_columns(self, image: Tensor) -> Bool[Tensor, " l"]:
        """Which of `_image_embeds` are tokens of the image: not its delimiters, nor what opens."""
        layout = self.understanding_layout
        opening = torch.zeros(image.shape[1] - layout.length, dtype=torch.bool)
        return torch.cat([opening, layout.token_columns])

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
        return self.text(text, add_special_tokens=False)["input_ids"] if text else []

    def _image_ids(self, grid: Grid) -> list[int]:
        """What announces an image of so many rows and columns of local tokens, before its BOS."""
        return self._ids(self.backbone.prompts.image.format(rows=grid.rows, columns=grid.columns))

    def _question_ids(self, question: str) -> list[int]:
        """Question and what follows it, in parts, so that the answer never merges with them."""
        parts = self.backbone.prompts.question
        return [i for part in parts for i in self._ids(part.format(question))]

    def _answer_ids(self, answer: str) -> list[int]:
        return [*self._ids(self.backbone.prompts.answer.format(answer)), self._end()]

    def _caption_ids(self, caption: str) -> list[int]:
        """An empty caption gives guidance's unconditional prompt."""
        prompts = self.backbone.prompts
        words = [*self._start(), *self._ids(prompts.caption.format(caption))]
        full = [*words, *self._image_ids(self.layout.grid)]
        return full if caption else self._unconditional_ids(full)

    def _unconditional_ids(self, prompt: list[int]) -> list[int]:
        """What guidance contrasts a prompt with: a fixed text, or padding in place of its words."""
        fixed, image = self.backbone.prompts.unconditional, self._image_ids(self.layout.grid)
        if fixed is not None:
            return [*self._start(), *self._ids(fixed), *image]
        padding = self.text.pad_token_id
        if padding is None:
            raise InputError("the text tokenizer has no padding token: set its pad_token")
        kept = len(self._start())
        return [*prompt[:kept], *[int(padding)] * (len(prompt) - kept - len(image)), *image]

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
        """Backbone with projector and heads, and the pooler of a second encoder, if switched on."""
        parts = [self.backbone, *([] if self.understanding is None else [self.understanding])]
        return (p for part in parts for p in part.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> "UnifiedBase":
        """Switch the trained parts; tokenizer and codec stay in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        if self.codec is not None:
            self.codec.eval()
        return self

    def init_weights(self) -> None:
        """Nothing: every part has initialised itself."""
