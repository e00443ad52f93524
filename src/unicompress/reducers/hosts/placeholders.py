"""What the models of transformers share: image tokens are put where a placeholder id stands."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, Signals
from unicompress.reducers.hosts.base import Host, ImageField, Prompt
from unicompress.reducers.hosts.blocks import EncoderBlocks, spread
from unicompress.reducers.hosts.encoder import EncoderProbe
from unicompress.tokens import Grid


@dataclass
class Heard:
    """What has been seen of the prompt that is on its way to the language model."""

    parts: list[tuple[Grid, Signals]] = field(default_factory=list)  # in order of their tokens
    ids: Tensor | None = None
    mask: Tensor | None = None
    pictures: bool = False  # the forward pass that is under way carries pictures


class PlaceholderHost(Host):
    """Watches the feature method and the placeholder ids of a `...ForConditionalGeneration`.

    The feature method is the one that `generate` calls once for `mm_encoder_outputs` and that
    `forward` calls otherwise, so both ways are covered.
    """

    def inner(self, model: Any) -> Any:
        """The model without its head, which owns `get_image_features`."""
        return model.model

    def trunk(self, model: Any) -> nn.Module:
        return self.inner(model).language_model

    def parts(
        self, model: Any, given: dict[str, Any], output: Any, grids: list[Grid] | None
    ) -> list[Grid]:
        """Token grids of everything that `get_image_features(**given)` returned, in order.

        A square field per image, unless `grids` says otherwise.
        """
        fields = output.pooler_output
        return [square(len(tokens), grids, index) for index, tokens in enumerate(fields)]

    def probe(self, model: Any) -> EncoderProbe | None:
        """How to read the vision encoder's attention; None where that is not supported."""
        return None

    def blocks(self, model: Any, given: dict[str, Any]) -> EncoderBlocks:
        """The encoder's blocks up to where `get_image_features(**given)` takes its features.

        For hosts that give `encoder_groups`: those whose patches become tokens one by one.
        """
        raise InputError(f"{self.name} models do not merge inside their encoder: use inside=False")

    def latents(self, model: Any, given: dict[str, Any]) -> Signals:
        """Anchors of the generation branch for a batch of images; none by default."""
        return Signals()

    @contextmanager
    def watch(
        self, model: Any, reducer: Reducer, tracker: Any, grids: list[Grid] | None
    ) -> Iterator[None]:
        inner, heard = self.inner(model), Heard()
        steps = reducer.steps(tracker.depth)
        wanted = {name for step in steps for name in step.reducer.needs} & self.gives
        from_encoder = {
            name
            for step in steps
            if step.reducer.source == "encoder"
            for name in step.reducer.needs
        } & {"attention", "shallow_attention", "keys"}
        probe = self.probe(model) if from_encoder else None
        mergers = [step.reducer for step in steps if "encoder_groups" in step.reducer.needs]
        if mergers:
            self.blocks(model, {}).check()
        original = inner.get_image_features

        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            blocks = self.blocks(model, given) if mergers else None
            with ExitStack() as stack:
                if probe is not None:
                    stack.enter_context(probe.listening())
                if blocks is not None:
                    stack.enter_context(blocks.merging(mergers[0]))
                output = original(*args, **kwargs)
            signals = Signals()
            if any(name.startswith("anchor") for name in wanted):
                signals = self.latents(model, given)
            if probe is not None:
                signals = replace(signals, **probe.heard(from_encoder))
            if blocks is not None and blocks.groups is not None:
                # All places are filled for now; the cut before the language model empties them.
                owner = blocks.groups.owner
                output.pooler_output = spread(output.pooler_output, owner)
                signals = replace(signals, encoder_groups=owner)
            sizes = self.parts(model, given, output, grids)
            heard.parts = [(grid, signals.of(i)) for i, grid in enumerate(sizes)]
            return output

        def before_inner(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
            # A model may also write a placeholder by itself: that is text like any other.
            carries = kwargs.get("pixel_values") is not None or encoded is not None
            heard.ids = kwargs.get("input_ids", args[0] if args else None) if carries else None
            heard.mask, heard.pictures = kwargs.get("attention_mask"), carries

        def before_trunk(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not heard.pictures:
                return
            ids, heard.pictures = heard.ids, False
            if ids is None:
                raise InputError(
                    "image tokens cannot be found in inputs_embeds: pass input_ids instead"
                )
            tracker.announce(prompt_of(ids == inner.config.image_token_id, heard))
            heard.parts = []

        with ExitStack() as stack:
            for hook in (
                inner.register_forward_pre_hook(before_inner, with_kwargs=True),
                inner.language_model.register_forward_pre_hook(before_trunk, with_kwargs=True),
            ):
                stack.callback(hook.remove)
            vars(inner)["get_image_features"] = features
            stack.callback(vars(inner).pop, "get_image_features")
            yield


def square(count: int, grids: list[Grid] | None, index: int) -> Grid:
    """The grid of an image: as given, else a square one."""
    if grids is not None:
        if index >= len(grids) or grids[index].length != count:
            raise InputError(
                f"image {index} has {count} tokens, which none of the given grids fits: pass one "
                "grid per image, in order"
            )
        return grids[index]
    side = round(count**0.5)
    if side * side != count:
        raise InputError(f"{count} image tokens form no square: pass their grid with on(grids=...)")
    return Grid(side, side)


def prompt_of(images: Tensor, heard: Heard) -> Prompt:
    """Placeholders [b, l] (bool) and what was heard of the images, matched in reading order."""
    total = sum(grid.length for grid, _ in heard.parts)
    if total != int(images.sum()):
        raise InputError(
            f"the prompt has places for {int(images.sum())} image tokens, the images that were "
            f"encoded gave {total}: encode images inside the with block, and use one beam"
        )
    where = images.nonzero()
    fields, start = [], 0
    for grid, signals in heard.parts:
        spots = where[start : start + grid.length]
        start += grid.length
        fields.append(ImageField(int(spots[0, 0]), spots[:, 1], grid, signals))
    order = torch.arange(images.shape[1], device=images.device).expand_as(images)
    valid = torch.ones_like(images)
    if isinstance(heard.mask, Tensor) and heard.mask.ndim == 2:
        valid = heard.mask.bool()
    last_image = torch.where(images, order, -1).amax(dim=1, keepdim=True)
    text = valid & ~images & (order > last_image)
    # Where nothing follows the last image, the text before it is the question.
    text = torch.where(text.any(dim=1, keepdim=True), text, valid & ~images)
    return Prompt(tuple(fields), text, torch.where(valid, order, 0).amax(dim=1))
