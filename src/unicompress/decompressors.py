"""Expanding (G^, X^) to the dense tokens that the host's decoder expects (eq. 7)."""

from dataclasses import dataclass
from math import cos, floor, pi

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from unicompress.decompressor_heads import (
    CodesHead,
    Embed,
    Feedback,
    RegressionHead,
    Sampling,
    code_rows,
)
from unicompress.engine import fixed_shapes, repeat
from unicompress.errors import InputError
from unicompress.layers import (
    CrossStack,
    GridMixer,
    KeysValues,
    cell_mask,
    from_cells,
    grid_coordinates,
    parent_index,
    position_features,
    to_cells,
)
from unicompress.tokens import Grid

ORDERS = ("raster", "block", "parallel")
HEADS = ("codes", "regression")

__all__ = ["HEADS", "ORDERS", "Decompressed", "Decompressor", "code_rows"]


@dataclass(frozen=True)
class Decompressed:
    """What `Decompressor.generate` produced."""

    dense: Float[Tensor, "b t e"]
    codes: Int[Tensor, "b t c"] | None  # None for the regression head
    steps: int = 0  # passes through the transformer


@dataclass(frozen=True)
class Conditions:
    """Everything about (G^, X^) that is computed once per image."""

    memory: list[KeysValues]  # of the cross-attention, per layer
    base: Float[Tensor, "b n w"]  # the part of each step's input that is known beforehand
    parents: Float[Tensor, "b n e"]  # the local token that each unit lies in
    present: Bool[Tensor, "n k"]  # which children of each unit lie on the grid
    unit: int  # side of a unit in dense tokens
    grid: Grid  # dense


class Decompressor(nn.Module):
    """Transformer that expands (G^, X^) to dense tokens; f_dec of eq. 7.

    It works on units: single tokens in `raster` order (the paper), whole cells in `block` and
    `parallel`. Causal orders see the earlier units and (G^, X^) by cross-attention in every layer;
    `parallel` sees all units, and with the codes head may unmask the surest tokens over
    `parallel_steps` passes. The regression head always needs one pass there.

    Heads: `regression` predicts the token (the paper), `codes` a categorical over the host's
    codebook; the codes of one token, and the tokens of one unit, are independent given the hidden
    state of their unit.

    Beyond the paper, each an option: `parent` adds the local token a unit lies in to the unit's
    input, `summary` adds one learned map per global token (a short way for G), `residual` starts
    from nearest-neighbor expansion (with codes: from a Gaussian around it, which needs `rows`),
    `mixing` puts 3x3 convolutions over X^ (once per image).
    """

    def __init__(
        self,
        *,
        code_dim: int,
        codes_per_token: int,
        codebook_size: int,
        order: str = "block",
        head: str = "codes",
        strides: tuple[int, ...] = (2,),
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        parallel_steps: int = 1,
        max_globals: int = 16,
        parent: bool = True,
        summary: bool = True,
        residual: bool = False,
        mixing: int = 0,
        rows: Float[Tensor, "c v e"] | None = None,
    ):
        super().__init__()
        _check_options(order, head, strides, depth, parallel_steps)
        self.code_dim, self.codes_per_token = code_dim, codes_per_token
        self.codebook_size = codebook_size
        self.order, self.head = order, head
        self.strides = tuple(sorted(set(strides)))
        self.width, self.depth, self.heads = width, depth, heads
        self.parallel_steps = parallel_steps if order == "parallel" and head == "codes" else 1
        self.max_globals = max_globals
        self.parent, self.summary, self.residual, self.mixing = parent, summary, residual, mixing

        self.input_mean: Tensor
        self.input_scale: Tensor
        self.register_buffer("input_mean", torch.zeros(code_dim))
        self.register_buffer("input_scale", torch.ones(code_dim))
        self.global_in = nn.Linear(code_dim, width)
        self.local_in = nn.Linear(code_dim, width)
        self.mixer = GridMixer(width, mixing)
        self.slots = nn.Parameter(torch.randn(max_globals, width))
        self.stride_embedding = nn.Parameter(torch.randn(len(self.strides), width))
        self.memory_norm = nn.LayerNorm(width)
        if summary:
            spread = (code_dim * max(max_globals, 1)) ** -0.5
            self.summary_maps = nn.Parameter(spread * torch.randn(max_globals, code_dim, width))
        self._build_units(width)
        self.stack = CrossStack(width, heads, depth)
        self.predictor: nn.Module
        if head == "regression":
            self.predictor = RegressionHead(self.child_width, code_dim, residual=residual)
            return
        if residual and rows is None:
            raise InputError(
                "residual with the codes head needs rows: pass code_rows(tokenizer.embed, ...)"
            )
        self.predictor = CodesHead(
            self.child_width, code_dim, codes_per_token, codebook_size, rows if residual else None
        )

    def _build_units(self, width: int) -> None:
        """One input map and one output map per unit size."""
        units = (1,) if self.order == "raster" else self.strides
        self.child_width = max(32, width // 2)
        self.units_in = nn.ModuleDict()
        if self.causal:
            self.start = nn.Parameter(torch.randn(width))
        if self.causal or self.parallel_steps > 1:
            flags = 0 if self.causal else 1  # says which tokens are masked
            for unit in units:
                self.units_in[str(unit)] = nn.Linear(unit**2 * (self.code_dim + flags), width)
        self.units_out = nn.ModuleDict(
            {str(unit): nn.Linear(width, unit**2 * self.child_width) for unit in units}
        )
        self.out_norm = nn.LayerNorm(width)

    @property
    def causal(self) -> bool:
        """Whether units are produced one after the other."""
        return self.order != "parallel"

    def steps(self, dense_grid: Grid, stride: int) -> int:
        """Passes through the transformer that `generate` needs."""
        if not self.causal:
            return self.parallel_steps
        return dense_grid.pooled(self._unit(stride)).length

    @torch.no_grad()
    def calibrate(self, target: Float[Tensor, "b t e"]) -> None:
        """Remember mean and deviation of dense targets: the scale of all inputs and outputs."""
        self.input_mean.copy_(target.mean(dim=(0, 1)))
        self.input_scale.copy_(target.std(dim=(0, 1)).clamp(min=1e-6))

    def forward(
        self,
        globals_: Float[Tensor, "b g e"],
        locals_: Float[Tensor, "b m e"],
        dense_grid: Grid,
        stride: int,
        target: Float[Tensor, "b t e"] | None = None,
        visible: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t e"] | Float[Tensor, "b t c v"]:
        """Predictions under teacher forcing: tokens (regression) or logits (codes).

        `target` is what the causal orders are fed: the dense tokens for regression (add noise to
        them to make the model sturdy against its own errors), the embedded dense codes for codes.
        `visible` marks the tokens that the parallel order is shown (see `draw_visible`); the loss
        belongs to the others. Raises InputError when shapes, stride or grid disagree.
        """
        conditions = self._conditions(globals_, locals_, dense_grid, stride)
        inputs = self._inputs(conditions, target, visible)
        hidden = self.stack(inputs, conditions.memory, causal=self.causal)
        cells = self._predict(hidden, conditions.parents, conditions.unit)
        return from_cells(cells, dense_grid, conditions.unit)

    def draw_visible(
        self, batch: int, length: int, generator: torch.Generator
    ) -> Bool[Tensor, "b t"] | None:
        """Tokens to show in training, as many as before a random pass; None without such passes."""
        if self.parallel_steps == 1:
            return None
        passes = torch.randint(self.parallel_steps, (batch,), generator=generator).tolist()
        counts = torch.tensor([self._known(done, length) for done in passes])
        ranks = torch.rand(batch, length, generator=generator).argsort(dim=1).argsort(dim=1)
        return ranks < counts[:, None]

    @torch.no_grad()
    def generate(
        self,
        globals_: Float[Tensor, "b g e"],
        locals_: Float[Tensor, "b m e"],
        dense_grid: Grid,
        stride: int,
        embed: Embed | None = None,
        generator: torch.Generator | None = None,
        temperature: float = 0.0,
        use_cache: bool = True,
    ) -> Decompressed:
        """Expand without teacher: each step is fed what the model itself produced.

        Temperature 0 takes the likeliest codes; above, codes are drawn with `generator`. Without
        cache every step computes the whole prefix again: for tests.
        """
        sampling = None
        if self.head == "codes":
            if embed is None:
                raise InputError("the codes head needs embed, the map from codes to tokens")
            sampling = Sampling(embed, generator, temperature)
        conditions = self._conditions(globals_, locals_, dense_grid, stride)
        if self.causal:
            return self._generate_causal(conditions, sampling, use_cache)
        return self._generate_parallel(conditions, sampling)

    def _generate_causal(
        self, conditions: Conditions, sampling: Sampling | None, use_cache: bool
    ) -> Decompressed:
        """One unit per step."""
        base, unit, grid = conditions.base, conditions.unit, conditions.grid
        run = self._steps_without_cache if not use_cache else self._steps
        # Random codes come from a generator on the host, which no recording can ask.
        greedy = sampling is None or sampling.temperature == 0
        if use_cache and greedy and fixed_shapes() and base.shape[1] > 1:
            run = self._fixed_steps
        found = run(conditions, self._feedback(conditions, sampling))
        codes = None
        if sampling is not None:  # looked up once for all units
            codes = from_cells(found, grid, unit)
            dense = sampling.embed(codes)
        else:
            dense = from_cells(found, grid, unit)
        return Decompressed(dense=dense, codes=codes, steps=base.shape[1])

    def _feedback(self, conditions: Conditions, sampling: Sampling | None) -> Feedback:
        """What the steps share of how a prediction is fed back, computed once per image."""
        unit, grid, table = conditions.unit, conditions.grid, None
        if sampling is not None and self.codes_per_token == 1:
            codes = torch.arange(self.codebook_size, device=conditions.base.device)
            table = self._scaled(sampling.embed(codes[None, :, None]))[0]
        ragged = grid.rows % unit or grid.columns % unit
        present = conditions.present[None, :, :, None].to(conditions.base) if ragged else None
        return Feedback(sampling, table, self._scaled, self.units_in[str(unit)], present)

    def _steps(self, conditions: Conditions, feedback: Feedback) -> Tensor:
        """Codes or tokens of all units, [b, n, k, ...]; each step reads the cache."""
        unit = conditions.unit
        bases, parents = conditions.base.split(1, dim=1), conditions.parents.split(1, dim=1)
        decoder = self.stack.decoder(conditions.memory, conditions.base, len(bases))
        inputs = bases[0] + self.start
        found: list[Tensor] = []
        for step, parent in enumerate(parents):
            if step:
                inputs = bases[step] + feedback.fed(found[-1], step - 1)
            hidden = decoder.step(inputs, step)
            found.append(feedback.settle(self._predict(hidden, parent, unit)))
        return torch.cat(found, dim=1)

    def _steps_without_cache(self, conditions: Conditions, feedback: Feedback) -> Tensor:
        """The same, computing the whole prefix at every step."""
        base, unit = conditions.base, conditions.unit
        inputs = base[:, :1] + self.start
        found: list[Tensor] = []
        for step in range(base.shape[1]):
            if step:
                newest = base[:, step : step + 1] + feedback.fed(found[-1], step - 1)
                inputs = torch.cat([inputs, newest], dim=1)
            hidden = self.stack(inputs, conditions.memory, causal=True)[:, -1:]
            cells = self._predict(hidden, conditions.parents[:, step : step + 1], unit)
            found.append(feedback.settle(cells))
        return torch.cat(found, dim=1)

    def _fixed_steps(self, conditions: Conditions, feedback: Feedback) -> Tensor:
        """The same with all state in tensors, for CUDA graphs and compilers."""
        base, parents, unit = conditions.base, conditions.parents, conditions.unit
        count = base.shape[1]
        decoder = self.stack.decoder(conditions.memory, base, count, fixed=True)
        place = torch.zeros(1, dtype=torch.long, device=base.device)
        hidden = decoder.step(base[:, :1] + self.start, place)
        first = feedback.settle(self._predict(hidden, parents[:, :1], unit))
        found = first.repeat_interleave(count, dim=1)  # every row but the first is overwritten

        def step() -> None:
            fed = feedback.fed(found.index_select(1, place), place)
            place.add_(1)
            hidden = decoder.step(base.index_select(1, place) + fed, place)
            cells = self._predict(hidden, parents.index_select(1, place), unit)
            found.index_copy_(1, place, feedback.settle(cells))

        repeat(step, count - 1, base.device)
        return found

    def _generate_parallel(self, conditions: Conditions, sampling: Sampling | None) -> Decompressed:
        """All units at once; each further pass keeps the tokens that were surest (MaskGIT)."""
        batch, length = conditions.base.shape[0], conditions.grid.length
        dense = conditions.base.new_zeros(batch, length, self.code_dim)
        visible = torch.zeros(batch, length, dtype=torch.bool, device=dense.device)
        codes = None
        for done in range(self.parallel_steps):
            inputs = self._inputs(conditions, dense, visible)
            hidden = self.stack(inputs, conditions.memory, causal=False)
            cells = self._predict(hidden, conditions.parents, conditions.unit)
            field = from_cells(cells, conditions.grid, conditions.unit)
            if sampling is None:
                return Decompressed(dense=field, codes=None, steps=1)
            drawn = sampling.draw(field)
            codes = drawn if codes is None else torch.where(visible[..., None], codes, drawn)
            dense = sampling.embed(codes)
            if done + 1 < self.parallel_steps:
                sure = field.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1).mean(-1)
                sure = sure.masked_fill(visible, torch.inf)
                kept = sure.topk(self._known(done + 1, length), dim=1).indices
                visible = visible.scatter(1, kept, True)
        return Decompressed(dense=dense, codes=codes, steps=self.parallel_steps)

    def _known(self, done: int, length: int) -> int:
        """Tokens that are settled after `done` passes: the cosine schedule of MaskGIT."""
        return length - floor(length * cos(pi / 2 * done / self.parallel_steps))

    def _unit(self, stride: int) -> int:
        return 1 if self.order == "raster" else stride

    def _scaled(self, tokens: Tensor) -> Tensor:
        return (tokens - self.input_mean) / self.input_scale

    def _conditions(self, globals_: Tensor, locals_: Tensor, grid: Grid, stride: int) -> Conditions:
        """Check (G^, X^) and compute what all steps share."""
        self._check(globals_, locals_, grid, stride)
        unit, pooled = self._unit(stride), grid.pooled(stride)
        count = globals_.shape[1]
        scaled_globals = self._scaled(globals_)
        field = self.local_in(self._scaled(locals_))
        if self.mixing:
            field = self.mixer(field, pooled)
        # From here on in the order of the units.
        positions = self._positions(grid, unit, field)
        index = parent_index(grid, stride).to(field.device) if unit != stride else None
        base = positions + self.stride_embedding[self.strides.index(stride)]
        base = base.expand(globals_.shape[0], -1, -1)
        if self.parent:
            base = base + (field if index is None else field[:, index])
        if self.summary and count:
            maps = self.summary_maps[:count]
            base = base + torch.einsum("bge,gew->bw", scaled_globals, maps).unsqueeze(1)
        read = torch.cat(
            [
                self.global_in(scaled_globals) + self.slots[:count],
                field + self._positions(grid, stride, field),
            ],
            dim=1,
        )
        memory = self.memory_norm(read)
        return Conditions(
            memory=self.stack.keys_values(memory),
            base=base,
            parents=locals_ if index is None else locals_[:, index],
            present=cell_mask(grid, unit).to(field.device),
            unit=unit,
            grid=grid,
        )

    def _positions(self, grid: Grid, stride: int, like: Tensor) -> Float[Tensor, "n w"]:
        return position_features(grid_coordinates(grid, stride), self.width).to(like)

    def _inputs(
        self, conditions: Conditions, target: Tensor | None, visible: Tensor | None
    ) -> Float[Tensor, "b n w"]:
        """Inputs of all units: what is known beforehand plus the tokens that are fed."""
        base, unit, grid = conditions.base, conditions.unit, conditions.grid
        if not self.causal and self.parallel_steps == 1:
            return base
        units_in = self.units_in[str(unit)]
        shape = (base.shape[0], grid.length, self.code_dim)
        if target is None and not self.causal:
            target = base.new_zeros(shape)
        if target is None or tuple(target.shape) != shape:
            raise InputError(
                f"{self.order} order needs a target of shape {list(shape)}, "
                f"got {None if target is None else list(target.shape)}"
            )
        fed = self._scaled(target)
        if self.causal:
            earlier = units_in(to_cells(fed, grid, unit)[:, :-1].flatten(2))
            start = self.start.expand(base.shape[0], 1, -1)
            return base + torch.cat([start, earlier], dim=1)
        if visible is None:
            visible = torch.zeros(shape[:2], dtype=torch.bool, device=fed.device)
        shown = visible.unsqueeze(-1).to(fed)
        return base + units_in(to_cells(torch.cat([fed * shown, shown], -1), grid, unit).flatten(2))

    def _predict(
        self, hidden: Float[Tensor, "b n w"], parents: Float[Tensor, "b n e"], unit: int
    ) -> Float[Tensor, "b n k e"] | Float[Tensor, "b n k c v"]:
        """Tokens or logits of the children of each unit."""
        children = self.units_out[str(unit)](self.out_norm(hidden))
        children = F.gelu(children.unflatten(-1, (unit**2, self.child_width)))
        return self.predictor(children, parents, self.input_mean, self.input_scale)

    def _check(self, globals_: Tensor, locals_: Tensor, grid: Grid, stride: int) -> None:
        if stride not in self.strides:
            raise InputError(
                f"this decompressor was built for strides {', '.join(map(str, self.strides))}, "
                f"got {stride}: choose one of them or train with strides=(..., {stride})"
            )
        if globals_.ndim != 3 or globals_.shape[-1] != self.code_dim:
            raise InputError(
                f"global tokens must have shape [batch, count, {self.code_dim}], "
                f"got {list(globals_.shape)}"
            )
        expected = (globals_.shape[0], grid.pooled(stride).length, self.code_dim)
        if tuple(locals_.shape) != expected:
            raise InputError(
                f"a {grid.rows}x{grid.columns} grid at stride {stride} needs local tokens of shape "
                f"{list(expected)}, got {list(locals_.shape)}"
            )
        if globals_.shape[1] > self.max_globals:
            raise InputError(
                f"at most {self.max_globals} global tokens, got {globals_.shape[1]}: "
                "build with a larger max_globals"
            )


def _check_options(
    order: str, head: str, strides: tuple[int, ...], depth: int, parallel_steps: int
) -> None:
    if order not in ORDERS:
        raise InputError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if head not in HEADS:
        raise InputError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if not strides or min(strides) < 1:
        raise InputError(f"strides must be at least one number of at least 1, got {strides}")
    if depth < 1 or parallel_steps < 1:
        raise InputError(
            f"depth and parallel_steps must be at least 1, got {depth} and {parallel_steps}"
        )
