"""Cuts inside a language model: hooks that shorten the sequence, and keep the books about it.

From the outside nothing changes: the sequence that goes in and the states that come out have their
full length (zeros where tokens were dropped), so a host's own indexing, masks and positions stay
right. Inside, each layer sees the columns that are left, with their masks, positions and cache.
A cut "before the language model" is a cut before its first layer, at the same cost.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unicompress.errors import InputError
from unicompress.reducers.base import Reducer, Reduction, Step, count_kept
from unicompress.reducers.hosts.attention import LayerView
from unicompress.reducers.hosts.base import Prompt
from unicompress.reducers.hosts.books import Call, Run, Stage
from unicompress.reducers.hosts.signals import gather_signals
from unicompress.reducers.selection import at
from unicompress.tokens import Grid

ENCODER = {"shallow_attention", "encoder_groups", "anchors", "anchor_tokens", "anchor_grid", "real"}
EITHER = {"attention", "keys"}


def from_encoder(reducer: Reducer) -> set[str]:
    """The signals that only the host can give, not its language model."""
    wanted = ENCODER | EITHER if reducer.source == "encoder" else ENCODER
    return set(reducer.needs) & wanted


class Tracker:
    """Carries out the steps of a reducer in a language model (the trunk, without its head)."""

    def __init__(self, trunk: Any, reducer: Reducer):
        self.trunk = trunk
        self.depth = len(trunk.layers)
        self.steps: dict[int, Step] = {}
        for step in reducer.steps(self.depth):
            if not 0 <= step.layer < self.depth:
                raise InputError(
                    f"the reducer {reducer.name!r} cuts before layer {step.layer}, but the "
                    f"language model has layers 0 to {self.depth - 1}: choose one of them"
                )
            if step.reducer.retroactive and step.reducer.positions == "reindex":
                raise InputError(
                    f"the reducer {reducer.name!r} also cuts what is cached, which cannot be "
                    "renumbered: use positions='keep'"
                )
            self.steps[step.layer] = step
        self.stash = {
            layer - 1 for layer, s in self.steps.items() if s.reducer.source == "previous"
        }
        self.reducer = reducer
        self.last: Run | None = None  # the latest prompt, for those who want to look
        self._announced: Prompt | None = None
        self._call: Call | None = None
        self._runs: weakref.WeakKeyDictionary[Any, Run] = weakref.WeakKeyDictionary()

    def announce(self, prompt: Prompt) -> None:
        """Tell what the next sequence holds; without images nothing will happen."""
        self._announced = prompt if prompt.fields else None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """All hooks, for the length of a block."""
        with ExitStack() as stack:
            for hook in (
                self.trunk.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.trunk.register_forward_hook(self._leave),
                *(
                    layer.register_forward_pre_hook(self._layer_hook(index), with_kwargs=True)
                    for index, layer in enumerate(self.trunk.layers)
                ),
            ):
                stack.callback(hook.remove)
            yield

    # The trunk

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        prompt, self._announced, self._call = self._announced, None, None
        if prompt is not None and embeds is not None:
            run = Run.of(prompt, embeds, kwargs.get("attention_mask"), cache)
        elif cache is not None and cache in self._runs:
            run = self._runs[cache]
        else:
            return None
        width = (embeds if embeds is not None else kwargs["input_ids"]).shape[1]
        mask = kwargs.get("attention_mask")
        whole = isinstance(mask, Tensor) and mask.ndim == 4
        positions = kwargs.get("position_ids")
        start = 0 if prompt is not None else run.length
        if positions is None:
            rows = len(run.stages[0].columns)
            positions = torch.arange(start, start + width, device=run.stages[0].columns.device)
            positions = positions.expand(rows, -1)
        self._call = Call(
            run,
            prompt is not None,
            width,
            positions[-3:] if positions.ndim == 3 else positions,
            mask if whole else None,
        )
        if prompt is None:
            run.extend(width, mask)
        # The trunk's own mask would be sized by a cache that is shorter than the sequence.
        return args, {
            **kwargs,
            "attention_mask": mask if whole else None,
            "position_ids": positions,
        }

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, self._call = self._call, None
        if call is None or not call.prefill:
            return None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            self._runs[cache] = call.run
        self.last = call.run
        stage = call.run.stage(self.depth - 1)
        hidden = output.last_hidden_state
        full = hidden.new_zeros(len(hidden), call.width, hidden.shape[-1])
        # Padding that a shorter row needed may repeat a column: it must not overwrite it.
        states = hidden * stage.own()[..., None]
        index = stage.columns[..., None].expand_as(hidden)
        output.last_hidden_state = full.scatter_add(1, index, states)
        return output

    # The layers

    def _layer_hook(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return None
            hidden = args[0] if args else kwargs["hidden_states"]
            call.cache = kwargs.get("past_key_values")  # the trunk may have made one
            if call.prefill and index in self.steps:
                hidden = self._cut(call, index, layer, hidden)
            settings = self._settings(call, index, hidden)
            if call.prefill and index in self.stash:
                call.view = LayerView(layer, hidden, *settings["position_embeddings"])
            kwargs = {**kwargs, **settings}
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _settings(self, call: Call, layer: int, hidden: Tensor) -> dict[str, Any]:
        """Mask and positions of a stage; computed once and shared by its layers."""
        stage = call.run.stage(layer)
        if stage.first not in call.prepared:
            positions = call.positions_in(stage)
            backend = self.trunk.config._attn_implementation
            tables = self.trunk.rotary_emb(hidden, positions)
            if call.prefill and stage.mixed is not None:
                tables = stage.mixed
            call.prepared[stage.first] = {
                "attention_mask": call.mask_in(stage, hidden, backend),
                "position_embeddings": tables,
                "position_ids": positions if positions.ndim == 2 else None,
            }
        return call.prepared[stage.first]

    # Cutting

    def _cut(self, call: Call, layer: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Reduce every image of the batch, and begin a new stage."""
        step, run = self.steps[layer], call.run
        before = run.stage(layer)
        if step.reducer.source == "previous":
            assert call.view is not None
            view = call.view
        else:
            tables = self._settings(call, layer - 1 if layer else 0, hidden)["position_embeddings"]
            view = LayerView(module, hidden, *tables)
        slot_of = before.slots(run.length)
        # What earlier cuts dropped stays dropped.
        keep = torch.zeros(len(hidden), run.length, dtype=torch.bool, device=hidden.device)
        keep = keep.scatter(1, before.columns, torch.ones_like(before.columns, dtype=torch.bool))
        hidden = hidden.clone()
        carried: list[tuple[int, Tensor, Tensor]] = []
        position_policy = step.reducer.positions
        for group in run.groups():
            fields = [run.prompt.fields[number] for number in group]
            rows = torch.tensor([f.row for f in fields], device=hidden.device)
            columns = torch.stack(
                [f.columns[run.alive[number]] for f, number in zip(fields, group, strict=True)]
            )
            keep[rows[:, None], columns] = False
            if step.keep == 0:
                for number in group:
                    run.alive[number] = run.alive[number][:0]
                continue
            slots = slot_of[rows[:, None], columns]
            tokens = hidden[rows[:, None], slots]
            total = len(fields[0].columns)
            grid = fields[0].grid if columns.shape[1] == total else Grid(1, columns.shape[1])
            signals = gather_signals(
                step.reducer, run, group, view, rows, slots, tokens, slot_of, before.valid
            )
            result = step.reducer(tokens, grid, signals, count=count_kept(step.keep, total))
            kept_slots = slots.gather(1, result.indices)
            hidden[rows[:, None], kept_slots] = result.tokens.to(hidden)
            keep[rows[:, None], columns.gather(1, result.indices)] = True
            position_policy = result.positions
            for place, number in enumerate(group):
                run.alive[number] = run.alive[number][result.indices[place]]
                single = Reduction(
                    result.indices[place, None],
                    result.tokens[place, None],
                    result.assignment[place, None],
                    result.positions,
                )
                run.reductions[number].append(single)
                if result.members is not None:
                    spread = slots[place][result.members[place]]
                    carried.append((int(rows[place]), kept_slots[place], spread))
        return self._begin(call, layer, before, keep, hidden, view, position_policy, carried)

    def _begin(
        self,
        call: Call,
        layer: int,
        before: Stage,
        keep: Bool[Tensor, "b l"],
        hidden: Tensor,
        view: LayerView,
        policy: str,
        carried: list[tuple[int, Tensor, Tensor]],
    ) -> Float[Tensor, "b m d"]:
        """The shorter sequence; rows that lose more are filled up on the left."""
        run = call.run
        stays = keep.gather(1, before.columns) & before.own()
        width = int(stays.sum(dim=1).max())
        slots = stays.long().argsort(dim=1, stable=True)[:, -width:]  # dropped ones first
        inside = stays.gather(1, slots)
        # A filler repeats the first column that stays, which `own` and `slots` can tell apart.
        first = slots.gather(1, inside.long().argmax(dim=1, keepdim=True))
        slots = torch.where(inside, slots, first)
        columns = before.columns.gather(1, slots)
        valid = before.valid.gather(1, slots) & inside
        offset, shift = before.offset.gather(1, slots), before.shift
        # Image tokens with rows and columns for positions (M-RoPE) have no line to close up on.
        if policy == "reindex" and call.positions.ndim == 2:
            gone = (~keep).cumsum(dim=1)
            offset, shift = gone.gather(1, columns), gone[:, -1]
        stage = Stage(layer, columns, valid, offset, shift)
        if carried:
            stage.mixed = self._mixed(view, slots, carried)
        if self.steps[layer].reducer.retroactive:
            self._forget(call, before, slots)
            stage.first = 0
            run.stages = [stage]
            call.prepared.clear()
        else:
            run.stages = [s for s in run.stages if s.first != layer] + [stage]
            call.prepared.pop(layer, None)
        return at(hidden, slots)

    def _mixed(
        self, view: LayerView, slots: Int[Tensor, "b m"], carried: list[tuple[int, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """RoPE rows in which channel i of a merged token has the position of member i mod m."""
        tables = []
        for table in (view.cosines, view.sines):
            table = table.expand(len(slots), -1, -1)
            new = table.clone()
            half = table.shape[-1] // 2
            for row, targets, members in carried:
                channel = torch.arange(table.shape[-1], device=table.device) % half
                source = members[:, channel % members.shape[1]]  # [k, r]
                new[row, targets] = table[row].gather(0, source)
            tables.append(at(new, slots))
        return tables[0], tables[1]

    def _forget(self, call: Call, before: Stage, slots: Int[Tensor, "b m"]) -> None:
        """Drop the same columns from what earlier layers have cached."""
        cache = call.cache
        if cache is None:
            return
        for layer in cache.layers:
            if not getattr(layer, "is_initialized", False) or layer.get_seq_length() == 0:
                continue
            index = slots[:, None, :, None]
            held = []
            for name in ("keys", "values"):
                whole = getattr(layer, name)[:, :, : before.columns.shape[1]]
                held.append(whole.gather(2, index.expand(-1, whole.shape[1], -1, whole.shape[3])))
            if hasattr(layer, "filled"):  # memory reserved once: overwrite its beginning
                for name, part in zip(("keys", "values"), held, strict=True):
                    getattr(layer, name)[:, :, : part.shape[2]] = part
                layer.filled = held[0].shape[2]
            else:
                layer.keys, layer.values = held
