"""Everything joined: one language model that reads images and draws images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from unicompress.backbones.causal_lm import check_causal_lm, vocabulary
from unicompress.checkpoint import atomic_write, load_safetensors, read_json, save_safetensors
from unicompress.codec import ImageCodec
from unicompress.errors import CheckpointError, InputError
from unicompress.export import export_plain_lm
from unicompress.feature_taps import FeatureTap
from unicompress.generate import Sampling, Timings, draw_codes, measured, noise, write_answers
from unicompress.hub import fetch_folder
from unicompress.losses import LossOutput, answer_loss, code_loss
from unicompress.released.base import releases
from unicompress.sequence import pack_text
from unicompress.tokenizers.base import ImageTokenizer, tokenizers
from unicompress.tokens import EncodedImages
from unicompress.unified_base import UnifiedBase
from unicompress.unified_parts import (
    UnifiedConfig,
    check_options,
    check_reading,
    code_space,
    load_part,
    merged_lm,
    plain_state,
    pool_options,
    untied,
)

__all__ = ["DESCRIBE", "LossOutput", "Timings", "UnifiedConfig", "UnifiedModel"]

DESCRIBE = "describe the picture"
FORMAT = "unicompress-model-1"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class UnifiedModel(UnifiedBase):
    """An image tokenizer, a codec (None: the dense model) and any Hugging Face causal LM.

    Understanding reads continuous {G, X^} through a projector, generation emits codes. Tokenizer
    and codec stay frozen and in evaluation mode whatever happens to the rest.
    """

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
        backbone: str = "causal_lm",
        tap: FeatureTap | None = None,
        accelerators: Sequence[str] = (),
    ) -> "UnifiedModel":
        """Join parts; the LM's vocabulary is extended by the image's entries, in place.

        `backbone` names how codes enter and leave (`causal_lm`, or that of a released model, which
        leaves the vocabulary alone). `tap` is an encoder that reads in the tokenizer's place; its
        field is pooled at the codec's rate by a pooler that is trained with the language model.
        `accelerators`, such as `himix`, change how its layers compute image tokens.

        `projector` is `local` or `linear`, with options as in `local(width=64)`. `code_loss` is
        `slot` (each code among the codes possible there) or `vocabulary` (among all entries of
        the LM, delimiters too, so that an exported model can be sampled without constraints).
        """
        check_options(tokenizer, codec, understanding_source, code_loss)
        check_reading(backbone, understanding_source, tap)
        rows = len(vocabulary(lm))
        text_size = max(rows, len(text_tokenizer))
        space = code_space(text_size, tokenizer, codec, backbone)
        if code_loss == "vocabulary" and not space.in_vocabulary:
            raise InputError(f"codes are no vocabulary of the backbone {backbone}: use 'slot'")
        check_causal_lm(lm)
        if space.vocabulary_size != rows:
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
            backbone=backbone,
            tap=None if tap is None else str(tap),
            tap_pool=pool_options(tap, codec),
            accelerators=list(accelerators),
        )
        model = cls(
            config, tokenizer=tokenizer, codec=codec, lm=lm, text_tokenizer=text_tokenizer, tap=tap
        )
        model.backbone.take_codes(model.embed_stream)
        return model

    # Training

    def understanding_loss(
        self,
        pixels: Float[Tensor, "b 3 h w"] | Float[Tensor, "b t d"] | EncodedImages,
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
                    (self._question_ids(question), self._answer_ids(answer))
                    for question, answer in zip(asked, told, strict=True)
                ]
            )
        image, text = self._image_embeds(pixels), pack_text(blocks, self.tokenizer.device)
        self._check_length(image.shape[1] + int(text.lengths.max()), "the longest question")
        return answer_loss(self.backbone, image, text, self._token_columns(image))

    def generation_loss(
        self,
        pixels: Float[Tensor, "b 3 h w"] | Float[Tensor, "b t d"] | EncodedImages,
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

    # Use

    @torch.no_grad()
    def answer(
        self,
        images: Float[Tensor, "b 3 h w"] | Float[Tensor, "b t d"],
        questions: Sequence[str] | Sequence[Sequence[str]],
        max_new_tokens: int = 8,
    ) -> list[str] | list[list[str]]:
        """The most likely answer to one question per image, or to each of a list per image.

        Answers come in the shape of the questions. Each image is read once; no question sees
        another. Images may come as the tokenizer's dense tokens X where they have been computed.
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
        ids = write_answers(
            self.backbone,
            image,
            text,
            count=max_new_tokens,
            end=end,
            columns=self._token_columns(image),
        ).tolist()
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
        self._check_length(
            max(map(len, ids)) + self.layout.length, "the longest prompt with a picture"
        )
        codes_per_token = self.tokenizer.spec.codes_per_token
        return draw_codes(
            self.backbone,
            self.layout,
            ids,
            unconditional=[self._unconditional_ids(i) for i in ids] if sampling.guided else [],
            sampling=sampling,
            uniforms=noise(seeds, self.layout.tokens, codes_per_token),
            timings=timings,
        )

    @torch.no_grad()
    def decode_codes(
        self, codes: Int[Tensor, "b n c"], timings: Timings | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """Codes to pixels in [-1, 1]: the decompressor if there is one, then the host's decoder."""
        with measured(timings, "decompressor"):
            dense = self.codec.decompress(codes) if self.codec else self.tokenizer.embed(codes)
        with measured(timings, "image_decoder"):
            return self.tokenizer.decode(dense)

    def _decode(self, ids: list[int], end: int) -> str:
        kept = ids[: ids.index(end)] if end in ids else ids
        return str(self.text.decode(kept, skip_special_tokens=True)).strip()

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
        tensors = dict(self.tokenizer.state_dict(prefix="tokenizer."))
        if self.codec is not None:
            tensors |= self.codec.state_dict(prefix="codec.")
        if self.understanding is not None:
            tensors |= self.understanding.state_dict(prefix="understanding.")
        tensors |= plain_state(self.backbone)
        if dtype is not None:
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        self.config.architectures = [type(self).__name__]
        config = self.config.to_json_string().encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.text.save_pretrained(folder)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder}: {error.strerror or error}") from error
        save_safetensors(tensors, folder / WEIGHTS, {"format": FORMAT})
        atomic_write(folder / CONFIG, lambda file: file.write(config))

    def export_causal_lm(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a plain causal LM that draws (one code per token only); see `export_plain_lm`."""
        if "generation" in self.backbone.accelerators:
            raise InputError(
                f"a model that draws with {self.backbone.accelerators['generation']} is no plain "
                "language model: keep it as a unified model"
            )
        export_plain_lm(
            folder,
            lm=merged_lm(self.lm),
            text=self.text,
            space=self.backbone.space,
            layout=self.layout,
            dtype=dtype,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: UnifiedConfig | None = None,
        codec: Path | str | None = None,
        release: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        revision: str | None = None,
        **_ignored: Any,
    ) -> "UnifiedModel":
        """Load a folder written by `save_pretrained`, a released unified model, or a hub id.

        A released model comes dense; with `codec`, the folder of a plug-in trained around
        the tokenizer in it, it comes compressed and is then to be trained in stage two. Save it to
        have a folder that a recipe can `start` from. `release` sets options of its loader, as in
        `emu3(rows=32, columns=32)`.

        Weights come as float32 unless `dtype` says otherwise; further options, which `AutoModel`
        passes along, have no effect. Raises CheckpointError for damaged or foreign files.
        """
        source = pretrained_model_name_or_path
        folder = fetch_folder(source, [CONFIG, WEIGHTS, *TEXT_FILES], revision=revision)
        if config is None:
            values = read_json(folder / CONFIG)
            kind = values.get("model_type") if isinstance(values, dict) else None
            if kind != cls.config_class.model_type and kind in releases.names():
                spec = release or str(kind)
                if spec.partition("(")[0] != kind:
                    raise InputError(f"{source} is a released {kind}: release cannot be {spec}")
                return cls._from_release(spec, source, codec, dtype, revision)
            if (
                not isinstance(values, dict)
                or values.get("model_type") != cls.config_class.model_type
            ):
                raise CheckpointError(f"{folder / CONFIG} does not describe a unicompress model")
            config = UnifiedConfig.from_dict(values)
        if codec is not None:
            raise InputError(f"{source} already says whether it compresses: leave out codec")
        if release is not None:
            raise InputError(f"{source} is a model of our own: leave out release={release!r}")
        tensors, notes = load_safetensors(folder / WEIGHTS)
        if notes.get("format") != FORMAT:
            raise CheckpointError(f"{folder / WEIGHTS} does not hold a unicompress model")
        text = PreTrainedTokenizerFast.from_pretrained(folder)
        # The codec derives tables from the host, so the host's weights come first.
        host = tokenizers.build(config.tokenizer)
        load_part(host, "tokenizer", tensors, folder / WEIGHTS)
        model = cls(config, tokenizer=host, text_tokenizer=text)
        tensors = untied(tensors, model.lm)
        load_part(model.backbone, "backbone", tensors, folder / WEIGHTS)
        if model.codec is not None:
            load_part(model.codec, "codec", tensors, folder / WEIGHTS)
        if model.understanding is not None:
            load_part(model.understanding, "understanding", tensors, folder / WEIGHTS)
        return model._in(dtype)

    @classmethod
    def _from_release(
        cls,
        spec: str,
        source: str | Path,
        codec: Path | str | None,
        dtype: torch.dtype | str,
        revision: str | None,
    ) -> "UnifiedModel":
        release = releases.build(spec).load(source, revision=revision)
        model = cls.from_parts(
            tokenizer=release.tokenizer,
            codec=None if codec is None else ImageCodec.from_pretrained(codec, release.tokenizer),
            lm=release.lm,
            text_tokenizer=release.text_tokenizer,
            projector=release.projector,
            understanding_source=release.understanding_source,
            backbone=release.backbone,
            tap=release.tap,
        )
        own = model.codec is not None and "local" in model.codec.requantizer.codebooks
        release.fill(model.backbone, own=own)
        return model._in(dtype)

    def _in(self, dtype: torch.dtype | str) -> "UnifiedModel":
        """Ready for use, in a precision."""
        wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        nn.Module.to(self, wanted)  # the class's own decorates it for quantized models
        return self.eval()


def _check_count(images: Tensor | EncodedImages, texts: Sequence[Any], what: str) -> None:
    if not len(images):
        raise InputError("there is no image: pass at least one")
    if isinstance(texts, str) or len(texts) != len(images):
        count = "a string" if isinstance(texts, str) else len(texts)
        raise InputError(f"{len(images)} images need one {what} each, got {count}")


AutoConfig.register(UnifiedConfig.model_type, UnifiedConfig)
AutoModel.register(UnifiedConfig, UnifiedModel)
