"""Recipes: what a run is told, read from YAML, overridden by `key=value`, checked at once."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unicompress.errors import RecipeError


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SceneData(Strict):
    """The built-in generated scenes; they never run out."""

    kind: Literal["scenes"] = "scenes"
    weight: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)  # added to the recipe's
    split: Literal["train", "val", "test"] = "train"


class EasyVQAData(Strict):
    """The training questions of the package easy-vqa."""

    kind: Literal["easy_vqa"]
    weight: float = Field(default=1.0, gt=0)


class StreamData(Strict):
    """The user's own images, streamed by Hugging Face `datasets`.

    `path` is a folder, a parquet file, a webdataset tar (globs allowed), or a name on the hub. A
    caption trains drawing (and describing), question with answer trains answering.
    """

    kind: Literal["stream"]
    path: str
    format: Literal["folder", "parquet", "webdataset", "hub"]
    weight: float = Field(default=1.0, gt=0)
    split: str = "train"
    subset: str | None = None  # configuration name on the hub
    image: str = "image"  # column names
    caption: str | None = None
    question: str | None = None
    answer: str | None = None
    shuffle: int = Field(default=0, ge=0)  # samples in the shuffle buffer, 0 keeps the order

    @model_validator(mode="after")
    def _texts_complete(self) -> "StreamData":
        if (self.question is None) != (self.answer is None):
            raise ValueError("name the question column and the answer column together")
        return self


class PackedData(Strict):
    """A folder that `unicompress pack` wrote: images encoded once, for stage two only."""

    kind: Literal["packed"]
    path: str
    weight: float = Field(default=1.0, gt=0)


Data = Annotated[SceneData | EasyVQAData | StreamData | PackedData, Field(discriminator="kind")]


class LoopRecipe(Strict):
    """What every stage is told: data order, steps, optimiser, schedule, logging, checkpoints."""

    out: str  # folder of the run: final/, checkpoint/, log.jsonl, tensorboard/
    seed: int = Field(default=0, ge=0)
    steps: int = Field(gt=0)  # optimiser steps
    batch: int = Field(gt=0)  # samples per optimiser step, over all processes and micro-batches
    accumulate: int = Field(default=1, gt=0)  # micro-batches per optimiser step
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for linear layers, adamw for the rest
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.01, ge=0)  # of matrices only
    clip: float = Field(default=1.0, ge=0)  # largest gradient norm, 0 for none
    schedule: Literal["cosine", "constant"] = "cosine"  # constant ends with a linear cool-down
    warmup: float = Field(default=0.02, ge=0, lt=1)  # shares of the run
    cooldown: float = Field(default=0.2, ge=0, le=1)
    final_lr: float = Field(default=0.0, ge=0, le=1)  # share of lr at the end
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware has it
    cpu: bool = False  # stay on the CPU although there is an accelerator
    threads: int | None = Field(default=None, gt=0)  # of torch on the CPU
    log_every: int = Field(default=20, gt=0)  # steps
    validate_every: int = Field(default=0, ge=0)  # steps, 0 for at the end only
    validate_images: int = Field(default=64, gt=0)
    save_every: int = Field(default=500, gt=0)  # steps between checkpoints
    save_minutes: float = Field(default=5.0, gt=0)  # and minutes, whichever comes first
    max_minutes: float | None = Field(default=None, gt=0)  # stop there with a checkpoint
    time_budget_minutes: float | None = Field(default=None, gt=0)  # ends the run, shapes lr
    tensorboard: bool | None = None  # None: where it is installed
    data: tuple[Data, ...] = (SceneData(),)

    @model_validator(mode="after")
    def _sizes_fit(self) -> "LoopRecipe":
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is no multiple of accumulate {self.accumulate}")
        if not self.data:
            raise ValueError("data is empty: name at least one source")
        return self


# What may differ between a run and its continuation: none of it changes the numbers trained.
FREE = (
    "out",
    "threads",
    "log_every",
    "validate_every",
    "validate_images",
    "save_every",
    "save_minutes",
    "max_minutes",
    "tensorboard",
    "cpu",
)


class HostRecipe(Strict):
    """A tokenizer to build: a registered name and its options."""

    name: str = "janus_vq"
    options: dict[str, Any] = Field(default_factory=dict)


class ObjectiveRecipe(Strict):
    """The options of `TokenizerObjective`, which explains them."""

    quantize_from: float = Field(default=0.15, ge=0, le=1)
    freeze_centre: float = Field(default=0.6, ge=0, le=1)
    commitment: float = Field(default=0.02, ge=0)
    contrast: float = Field(default=0.05, ge=0)
    decay: float = Field(default=0.99, gt=0, lt=1)


class TokenizerRecipe(LoopRecipe):
    """Trains a host tokenizer from scratch."""

    tokenizer: HostRecipe = HostRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()


class StageOneRecipe(LoopRecipe):
    """Trains the plug-in around a frozen tokenizer."""

    tokenizer: str  # folder, or name on the hub, or a registered name with a checkpoint
    checkpoint: str | None = None  # of a tokenizer by its name: file, folder or name on the hub
    preset: str = "default"
    codec: dict[str, Any] = Field(default_factory=dict)  # fields of CodecSpec that differ from it
    random_rate: bool = False  # train all strides of the codec, and prefixes of G if nested
    calibrate_images: int = Field(default=256, gt=0)
    # A trained plug-in whose codes stay: its decompressor alone learns on, or with `codec`, which
    # then holds options of the decompressor that differ, a new one from the start.
    refine: str | None = None


class LanguageModelRecipe(Strict):
    """A Llama built from `config`, or any causal LM by its `name` on the hub (or folder)."""

    config: dict[str, Any] | None = None
    name: str | None = None
    vocab_size: int = Field(default=512, gt=257)  # of the text tokenizer built beside a config
    attention: Literal["sdpa", "eager"] = "sdpa"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> "LanguageModelRecipe":
        if (self.config is None) == (self.name is None):
            raise ValueError("give either config or name")
        return self


class LoraRecipe(Strict):
    """Low-rank adapters, merged into the weights when the run ends."""

    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class StageTwoRecipe(LoopRecipe):
    """Trains the language model on understanding and generation with a frozen tokenizer stack."""

    start: str | None = None  # a unified model (folder or hub name) to train on, instead of parts
    tokenizer: str | None = None  # folder, or name on the hub, or a registered name
    checkpoint: str | None = None  # of a tokenizer by its registered name
    codec: str | None = None  # likewise; None trains the dense model
    lm: LanguageModelRecipe | None = None
    lora: LoraRecipe | None = None
    projector: str = "local"  # or linear; options as in local(width=64, depth=2)
    accelerators: tuple[str, ...] = ()  # himix, hmgen(count=2), withdrawal(after=4); one a task
    understanding_source: Literal["continuous", "quantized"] = "continuous"
    code_loss: Literal["slot", "vocabulary"] = "slot"  # vocabulary: an export draws unaided
    understanding_share: float = Field(default=0.5, ge=0, le=1)  # of the samples of a batch
    understanding_weight: float = Field(default=1.0, ge=0)  # of its loss
    generation_weight: float = Field(default=1.0, ge=0)
    questions_per_image: int = Field(default=6, gt=0)
    describe: bool = True  # also ask for the caption of every captioned image
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)  # for classifier-free guidance

    @model_validator(mode="after")
    def _whole_or_parts(self) -> "StageTwoRecipe":
        if self.start is None and (self.tokenizer is None or self.lm is None):
            raise ValueError("name the tokenizer and the lm, or a unified model to start from")
        if self.start is not None and (self.tokenizer or self.codec or self.lm):
            raise ValueError("a model to start from brings tokenizer, codec and lm: leave them out")
        return self


R = TypeVar("R", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is given twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


SECTIONS = ("stage-one", "stage-two", "fine-tune")  # a file may hold several stages


def sections(path: Path | str) -> list[str]:
    """The stages that a recipe file holds; none where the file is one stage's."""
    return [name for name in _read(path)[0] if name in SECTIONS]


def load_recipe(
    model: type[R],
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    section: str | None = None,
) -> R:
    """Read a recipe and apply `dotted.key=value` overrides (values are YAML).

    A file may hold several stages as sections: `section` says which, and `file.yaml#section` says
    it for good. Raises RecipeError, in one line, for an unreadable file, an unknown key (naming the
    nearest valid one), a value outside its range or a missing one.
    """
    values, named = _read(path)
    if any(name in SECTIONS for name in values):
        section = named or section
        if section not in values:
            held = ", ".join(values)
            raise RecipeError(f"{path} has no section {section!r}, only {held}: write {path}#NAME")
        values = values[section]
        if not isinstance(values, dict):
            raise RecipeError(f"{path}: the section {section} must hold `key: value` lines")
    elif named:
        raise RecipeError(f"{path}: the file is a single stage's, it has no sections")
    for override in overrides:
        _apply(values, override)
    return parse_recipe(model, values, str(path))


def split_section(path: Path | str) -> tuple[str, str]:
    """The file, and the section that follows a # in its name."""
    name, _, section = str(path).rpartition("#")
    return (name, section) if section in SECTIONS else (str(path), "")


def _read(path: Path | str) -> tuple[dict[str, Any], str]:
    """The values of a file, and the section that follows a # in its name."""
    name, section = split_section(path)
    path = Path(name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path} is not a YAML file: {reason}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it must hold `key: value` lines")
    return values, section


def parse_recipe(model: type[R], values: Mapping[str, Any], source: str) -> R:
    """Check plain values against a recipe's schema; `source` names them in errors."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelt key is the cause, a field missing for it only the symptom.
        first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
        raise RecipeError(_one_line(model, first, source)) from error


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise RecipeError for a key that is not known, naming the nearest one."""
    known = list(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"unknown key {where}.{key}.{_hint(key, known)}")


def check_options(given: Mapping[str, Any], owner: Callable[..., Any], where: str) -> None:
    """`check_keys` against the parameters of a class or function."""
    check_keys(given, list(inspect.signature(owner).parameters), where)


def tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same options with the tuples that constructors ask for in place of YAML's lists."""
    return {key: _tuple(value) for key, value in options.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(entry) for entry in value) if isinstance(value, list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"cannot read the override {override!r}: write key=value, or a.b=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"cannot read the value of {override!r}: quote it as in YAML") from error
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        if isinstance(place, dict) and place.get(parent) is None:
            place[parent] = {}
        place = _entry(place, parent, key)
    if isinstance(place, list):
        _entry(place, last, key)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"cannot set {key}: what stands before {last!r} has no keys of its own")


def _entry(place: Any, name: str, key: str) -> Any:
    if isinstance(place, dict):
        return place[name]
    if isinstance(place, list):
        if not name.isdecimal() or int(name) >= len(place):
            raise RecipeError(f"cannot set {key}: {name!r} is no place in a list of {len(place)}")
        return place[int(name)]
    raise RecipeError(f"cannot set {key}: what stands before {name!r} has no keys of its own")


def _one_line(model: type[BaseModel], problem: Any, source: str) -> str:
    """One sentence for a pydantic error."""
    parts = [part for part in problem["loc"] if part not in _KINDS]
    where = ".".join(str(part) for part in parts)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, problem["loc"][:-1])
        return f"{source}: unknown key {where}.{_hint(str(parts[-1]), known)}"
    if problem["type"] == "missing":
        return f"{source}: {where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not where or isinstance(problem["input"], dict):
        return f"{source}: {where + ': ' if where else ''}{message}"
    return f"{source}: {where}: {message}, got {problem['input']!r}"


_KINDS = ("scenes", "easy_vqa", "stream", "packed")  # tags that pydantic puts into an error's place


def _known_keys(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys allowed at a place of a recipe."""
    kinds: dict[str, type[BaseModel]] = {
        "scenes": SceneData,
        "easy_vqa": EasyVQAData,
        "stream": StreamData,
        "packed": PackedData,
    }
    for part in place:
        if part in kinds:
            model = kinds[str(part)]
        elif isinstance(part, str):
            field = model.model_fields.get(part)
            options = (field.annotation, *get_args(field.annotation)) if field else ()
            inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
            model = inner[0] if inner else model
    return list(model.model_fields)


def _hint(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}"
