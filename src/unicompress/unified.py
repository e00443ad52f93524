"""Everything joined: one language model that reads images and draws images."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unicompress.backbones.base import CodeSpace
from unicompress.backbones.causal_lm import CausalLM
from unicompress.backbones.projectors import projectors
from unicompress.checkpoint import load_into, load_safetensors, read_json, save_safetensors
from unicompress.codec import CodecSpec, ImageCodec
from unicompress.errors import CheckpointError, InputError
from unicompress.generate import Sampling, Timings, draw_codes, measured, noise, write_answers
from unicompress.hub import fetch_folder
from unicompress.losses import LossOutput, answer_loss, code_loss
from unicompress.sequence import ImageLayout, pack_text
from unicompress.tokenizers.base import ImageTokenizer, tokenizers

DESCRIBE = "describe the picture"
SOURCES = ("continuous", "quantized")
LOSSES = ("slot", "vocabulary")
FORMAT = "unicompress-model-1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class UnifiedConfig(PreTrainedConfig):
    """What rebuilds a unified model: its parts as plain values."""

    model_type = "unicompress"

    lm: dict[str, Any] | None = None  # the language model's own configuration
    tokenizer: str = ""  # spec of the host, as in `tokenizers.build`
    codec: dict[str, Any] | None = None  # CodecSpec; None: the dense model
    projector: str = "local"
    understanding_source: str = "continuous"
    code_loss: str = "slot"
    text_size: int = 0
    attention: str = "sdpa"


class UnifiedModel(PreTrainedModel):
    """An image tokenizer, a codec (None: the dense model) and any Hugging Face causal LM.

    Understanding reads continuous {G, X^} through a projector, generation emits codes. Tokenizer
    and codec stay frozen and in evaluation mode whatever happens to the rest.
    """

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
            lm = _build_lm(config)
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

    @classmethod
    def from_parts(
        cls,
        *,
        tokenizer: ImageTokenizer,
        lm: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerFast,
        codec: ImageCodec | None = None,
        projector: str = "local",
        understanding_source: str = "continuous",
        code_loss: str = "slot",
    ) -> "UnifiedModel":
        """Join parts; the LM's vocabulary is extended by the image's entries, in place.

        `projector` is `local` or `linear`, with options as in `local(width=64)`. `code_loss` is
        `slot` (each code among the codes possible there) or `vocabulary` (among all entries of
        the LM, delimiters too, so that an exported model can be sampled without constraints).
        """
        for name, value, known in (
            ("understanding_source", understanding_source, SOURCES),
            ("code_loss", code_loss, LOSSES),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if codec is not None and codec.tokenizer is not tokenizer:
            raise InputError("the codec was built around another tokenizer object: pass that one")
        if code_loss == "vocabulary" and tokenizer.spec.codes_per_token > 1:
            raise InputError(
                "code_loss 'vocabulary' needs one code per token, this tokenizer has "
                f"{tokenizer.spec.codes_per_token}: use 'slot'"
            )
        text_size = max(len(lm.get_input_embeddings().weight), len(text_tokenizer))
        space = code_space(text_size, tokenizer, codec)
        lm.resize_token_embeddings(space.vocabulary_size, mean_resizing=False)
        config = UnifiedConfig(
            lm=lm.config.to_dict(),
            tokenizer=str(tokenizer),
            codec=None if codec is None else codec.spec.to_dict(),
            projector=projector,
            understanding_source=understanding_source,
            code_loss=code_loss,
            text_size=text_size,
            attention=lm.config._attn_implementation,
        )
        return cls(config, tokenizer=tokenizer, codec=codec, lm=lm, text_tokenizer=text_tokenizer)

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
    def lm(self) -> PreTrainedModel:
        """The language model; assign to it to put an adapter around it."""
        return self.backbone.lm

    def __setattr__(self, name: str, value: Any) -> None:
        # torch would register a module under the property's name and leave the backbone as it is.
        if name == "lm":
            self.backbone.lm = value
        else:
            super().__setattr__(name, value)

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
                f"images must be at least one picture of floats in [-1, 1], got {list(images.shape)} "
                f"of {images.dtype}"
            )
        images = images.to(self.tokenizer.device)
        return self.tokenizer.encode(images) if pixels else images

    @torch.no_grad()
    def _features(self, images: Tensor) -> Float[Tensor, "b n d"]:
        dense = self._dense(images)
        tokens = self.codec.compress(dense) if self.codec else None
        if self.config.understanding_source == "quantized":
            quantize = self.codec.quantize(tokens) if tokens else self.tokenizer.quantize(dense)
            return quantize[1]
        return tokens.sequence if tokens else dense

    @torch.no_grad()
    def _codes(self, images: Tensor) -> Int[Tensor, "b n c"]:
        dense = self._dense(images)
        if self.codec is None:
            return self.tokenizer.quantize(dense)[0]
        return self.codec.quantize(self.codec.compress(dense))[0]

    def _image_embeds(self, images: Tensor) -> Float[Tensor, "b l h"]:
        """The image as understanding sees it, after the text's own start token if it has one."""
        layout = self.layout
        features = self._features(images)
        globals_, locals_ = features.split([layout.global_count, layout.local_count], dim=1)
        projected = self.backbone.embed_features(globals_, locals_, layout.grid)
        embeds = layout.arrange(self.backbone.delimiters(), projected)
        start = torch.tensor([self._start()], dtype=torch.long, device=embeds.device)
        opening = self.backbone.embed_text(start.expand(len(embeds), -1))
        return torch.cat([opening.to(embeds), embeds], dim=1)

    # Text

    @property
    def text(self) -> PreTrainedTokenizerFast:
        """The text tokenizer; raises InputError where the model was built without one."""
        if self.text_tokenizer is None:
            raise InputError("this model has no text tokenizer: pass text_tokenizer when building it")
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

    # Training

    def understanding_loss(
        self,
        pixels: Float[Tensor, "b 3 h w"] | Float[Tensor, "b t d"],
        questions: Sequence[Sequence[str]],
        answers: Sequence[Sequence[str]],
    ) -> LossOutput:
        """Cross-entropy of the answers, all questions of an image in one sequence.

        Each question sees the image and itself only. Logs: loss, tokens, accuracy (of tokens),
        answers (share that is right in full, teacher forced).
        """
        _check_count(pixels, questions, "list of questions")
        _check_count(pixels, answers, "list of answers")
        blocks = []
        for asked, told in zip(questions, answers, strict=True):
            if len(asked) != len(told):
                raise InputError(f"{len(asked)} questions came with {len(told)} answers")
            blocks.append(
                [
                    (self._question_ids(question), [*self._ids(answer), self._end()])
                    for question, answer in zip(asked, told, strict=True)
                ]
            )
        image, text = self._image_embeds(pixels), pack_text(blocks, self.tokenizer.device)
        self._check_length(image.shape[1] + int(text.lengths.max()), "the longest question")
        return answer_loss(self.backbone, image, text)

    def generation_loss(
        self,
        pixels: Float[Tensor, "b 3 h w"] | Float[Tensor, "b t d"],
        captions: Sequence[str],
    ) -> LossOutput:
        """Cross-entropy of the image's codes after the caption; an empty caption trains guidance.

        Logs: loss, tokens (codes), accuracy, and loss_global, loss_local for the streams.
        """
        _check_count(pixels, captions, "caption")
        prompts = [self._caption_ids(caption) for caption in captions]
        self._check_length(max(map(len, prompts)) + self.layout.length, "the longest caption")
        codes = self._codes(pixels)
        return code_loss(self.backbone, self.layout, prompts, codes, over=self.config.code_loss)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Projector, language model, special embeddings and depth heads, unless switched off."""
        return (p for p in self.backbone.parameters() if p.requires_grad)

    def train(self, mode: bool = True) -> "UnifiedModel":
        """Switch the trained parts; tokenizer and codec stay in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        if self.codec is not None:
            self.codec.eval()
        return self

    def init_weights(self) -> None:
        """Nothing: every part has initialised itself."""

    # Use

    @torch.no_grad()
    def answer(
        self,
        images: Float[Tensor, "b 3 h w"],
        questions: Sequence[str] | Sequence[Sequence[str]],
        max_new_tokens: int = 8,
    ) -> list[str] | list[list[str]]:
        """The most likely answer to one question per image, or to each of a list per image.

        Answers come in the shape of the questions. Each image is read once; no question sees
        another.
        """
        _check_count(images, questions, "question (or list of questions)")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        single = isinstance(questions[0], str)
        if any(isinstance(asked, str) != single for asked in questions):
            raise InputError("questions must be all strings or all lists of strings")
        nested: Any = [[asked] for asked in questions] if single else questions
        if not any(nested):
            raise InputError("there is no question to answer: pass at least one")
        text = pack_text(
            [[(self._question_ids(question), []) for question in asked] for asked in nested],
            self.tokenizer.device,
        )
        image = self._image_embeds(images)
        longest = image.shape[1] + int(text.lengths.max()) + max_new_tokens
        self._check_length(longest, "the longest question with its answer")
        end = self._end()
        ids = write_answers(self.backbone, image, text, count=max_new_tokens, end=end).tolist()
        answers = [
            [self._decode(row, end) for row in rows[: len(asked)]]
            for rows, asked in zip(ids, nested, strict=True)
        ]
        return [row[0] for row in answers] if single else answers

    def describe(self, images: Float[Tensor, "b 3 h w"], max_new_tokens: int = 64) -> list[str]:
        """A caption of each image: the answer to a fixed question that training asks as well."""
        return self.answer(images, [DESCRIBE] * len(images), max_new_tokens)  # type: ignore[return-value]

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        cfg: float = 2.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        timings: Timings | None = None,
    ) -> Float[Tensor, "b 3 h w"]:
        """Pictures in [-1, 1], one per prompt; see `draw_codes` for the options."""
        codes = self.draw_codes(
            prompts,
            cfg=cfg,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            timings=timings,
        )
        return self.decode_codes(codes, timings)

    @torch.no_grad()
    def draw_codes(
        self,
        prompts: Sequence[str],
        *,
        cfg: float = 2.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        timings: Timings | None = None,
    ) -> Int[Tensor, "b n c"]:
        """Codes of one picture per prompt, globals first.

        `cfg` 1 is no guidance; `temperature` 0 takes the best code; `top_k` 0 and `top_p` 1 keep
        all. Prompt i draws with `seed + i`, or with its own seed from a list: a picture depends on
        its prompt and seed, not on what is drawn beside it. `timings` collects the seconds of
        each part.
        """
        sampling = Sampling(cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p)
        if isinstance(prompts, str) or not prompts:
            raise InputError("draw needs a list of at least one prompt")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise InputError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        ids = [self._caption_ids(prompt) for prompt in prompts]
        self._check_length(max(map(len, ids)) + self.layout.length, "the longest prompt with a picture")
        codes_per_token = self.tokenizer.spec.codes_per_token
        return draw_codes(
            self.backbone,
            self.layout,
            ids,
            unconditional=self._caption_ids(""),
            sampling=sampling,
            uniforms=noise(seeds, self.layout.tokens, codes_per_token),
            timings=timings,
        )

    @torch.no_grad()
    def decode_codes(
        self, codes: Int[Tensor, "b n c"], timings: Timings | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Codes to pixels in [-1, 1]: decompressor (if there is a codec), then the host's decoder."""
        with measured(timings, "decompressor"):
            dense = self.codec.decompress(codes) if self.codec else self.tokenizer.embed(codes)
        with measured(timings, "image_decoder"):
            return self.tokenizer.decode(dense)

    def _decode(self, ids: list[int], end: int) -> str:
        kept = ids[: ids.index(end)] if end in ids else ids
        return self.text.decode(kept, skip_special_tokens=True).strip()

    # Files

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a folder that needs nothing else: configuration, all weights, text tokenizer.

        `dtype` (such as torch.bfloat16) stores floating-point weights in that type. An adapter is
        merged into the stored language model. There is one weights file; `max_shard_size` is what
        `push_to_hub` passes and has no effect.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.tokenizer.state_dict(prefix="tokenizer."))
        if self.codec is not None:
            tensors |= self.codec.state_dict(prefix="codec.")
        tensors |= plain_state(self.backbone)
        if dtype is not None:
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        self.text.save_pretrained(folder)
        save_safetensors(tensors, folder / WEIGHTS, {"format": FORMAT})
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: UnifiedConfig | None = None,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
        **_ignored: Any,
    ) -> "UnifiedModel":
        """Load a folder written by `save_pretrained`, or a hub id.

        Weights come as float32 unless `dtype` says otherwise; further options, which `AutoModel`
        passes along, have no effect. Raises CheckpointError for damaged or foreign files.
        """
        source = pretrained_model_name_or_path
        folder = fetch_folder(source, [CONFIG, WEIGHTS, *TEXT_FILES], revision=revision)
        if config is None:
            values = read_json(folder / CONFIG)
            if not isinstance(values, dict) or values.get("model_type") != cls.config_class.model_type:
                raise CheckpointError(f"{folder / CONFIG} does not describe a unicompress model")
            config = UnifiedConfig.from_dict(values)
        tensors, notes = load_safetensors(folder / WEIGHTS)
        if notes.get("format") != FORMAT:
            raise CheckpointError(f"{folder / WEIGHTS} does not hold a unicompress model")
        text = PreTrainedTokenizerFast.from_pretrained(folder)
        # The codec derives tables from the host, so the host's weights come first.
        host = tokenizers.build(config.tokenizer)
        load_part(host, "tokenizer", tensors, folder / WEIGHTS)
        model = cls(config, tokenizer=host, text_tokenizer=text)
        tied = tied_names(model.lm)
        tensors |= {f"backbone.lm.{a}": tensors[f"backbone.lm.{b}"] for a, b in tied.items()}
        load_part(model.backbone, "backbone", tensors, folder / WEIGHTS)
        if model.codec is not None:
            load_part(model.codec, "codec", tensors, folder / WEIGHTS)
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return model.to(wanted).eval()


def code_space(text_size: int, tokenizer: ImageTokenizer, codec: ImageCodec | None) -> CodeSpace:
    """The vocabulary of a model: a codec with codebooks of its own has one range for each stream."""
    depth, size = tokenizer.spec.codes_per_token, tokenizer.spec.codebook_size
    kinds = {codec.spec.global_codebook, codec.spec.local_codebook} if codec else set()
    if codec is None or codec.spec.identity or kinds == {"shared"}:
        return CodeSpace(text_size, depth, size)
    global_size, local_size = codec.codebook_sizes
    return CodeSpace(text_size, depth, local_size, global_size)


def load_part(module: nn.Module, name: str, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the weights of one part of a model, which stand under its name."""
    prefix = f"{name}."
    own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    load_into(module, own, path)


def plain_state(backbone: CausalLM) -> dict[str, Tensor]:
    """Weights of a backbone by the names they have without adapter; tied ones once."""
    lm = backbone.lm
    merged = copy.deepcopy(lm).merge_and_unload() if hasattr(lm, "merge_and_unload") else lm
    tied = tied_names(merged)
    own = {f"backbone.lm.{n}": t for n, t in merged.state_dict().items() if n not in tied}
    for name, child in backbone.named_children():
        if name != "lm":
            own |= child.state_dict(prefix=f"backbone.{name}.")
    return own


def tied_names(lm: PreTrainedModel) -> dict[str, str]:
    """Weights of a language model that are another one's: name -> name of the original."""
    return dict(lm.all_tied_weights_keys)


def _build_lm(config: UnifiedConfig) -> PreTrainedModel:
    values = dict(config.lm or {})
    kind = str(values.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"unknown language model type {kind!r}: update transformers")
    own = CONFIG_MAPPING[kind].from_dict(values)
    return AutoModelForCausalLM.from_config(
        own, attn_implementation=config.attention, dtype=torch.float32
    )


def _check_count(images: Tensor, texts: Sequence[Any], what: str) -> None:
    if isinstance(texts, str) or len(texts) != len(images):
        count = "a string" if isinstance(texts, str) else len(texts)
        raise InputError(f"{len(images)} images need one {what} each, got {count}")


AutoConfig.register(UnifiedConfig.model_type, UnifiedConfig)
AutoModel.register(UnifiedConfig, UnifiedModel)
