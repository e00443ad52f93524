"""The paper's equations in float64, one loop at a time: slow, and obvious enough to be believed."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(scores: Array) -> Array:
    """Of one row of scores."""
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def layer_norm(row: Array, weight: Array, bias: Array) -> Array:
    """Of one token; PyTorch's epsilon."""
    return (row - row.mean()) / np.sqrt(row.var() + 1e-5) * weight + bias


def gelu(row: Array) -> Array:
    """The exact form, with the error function."""
    return np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in row.flat]).reshape(
        row.shape
    )


def multi_head_attention(
    queries: Array, keys: Array, values: Array, heads: int, causal: bool = False
) -> Array:
    """MHA without its maps: queries [n, w], keys and values [m, w]; each head has its channels."""
    out = np.zeros_like(queries)
    width = queries.shape[1] // heads
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        for i, query in enumerate(queries[:, own]):
            last = i + 1 if causal else len(keys)
            scores = np.array([query @ key / np.sqrt(width) for key in keys[:last, own]])
            out[i, own] = softmax(scores) @ values[:last, own]
    return out


def pool(field: Array, rows: int, columns: int, stride: int, kind: str) -> Array:
    """Eq. 3 and its variants on one image [t, d]; cells at an odd edge take what is there."""
    cells = []
    for top in range(0, rows, stride):
        for left in range(0, columns, stride):
            children = np.array(
                [
                    field[r * columns + c]
                    for r in range(top, min(top + stride, rows))
                    for c in range(left, min(left + stride, columns))
                ]
            )
            if kind == "average":
                cells.append(children.mean(axis=0))
            elif kind == "max":
                cells.append(children.max(axis=0))
            elif kind == "top_k":
                cells.append(max(children, key=lambda child: float(child @ child)))
            else:
                raise ValueError(kind)
    return np.array(cells)


def nearest_code(token: Array, rows: Array, metric: str) -> int:
    """Eq. 4 for one token: the index of the nearest row."""
    if metric == "cosine":
        return int(np.argmax([row @ token / np.linalg.norm(row) for row in rows]))
    return int(np.argmin([np.sum((row - token) ** 2) for row in rows]))


def position(row: float, column: float, width: int) -> Array:
    """2-D position features of one place: sines and cosines of the row, then of the column."""
    count = width // 4
    features = []
    for place in (row, column):
        angles = [place * 100.0 ** (-i / count) for i in range(count)]
        features += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return math.sqrt(2) * np.array(features + [0.0] * (width - 4 * count))


def raster_decompressor(
    weights: dict[str, Array],
    globals_: Array,
    locals_: Array,
    target: Array,
    *,
    grid: tuple[int, int],
    stride: int,
    heads: int,
) -> Array:
    """Eq. 7 with regression for one image, literally: token t from the dense tokens before t.

    `weights` is the state of `Decompressor(order="raster", head="regression", parent=False,
    summary=False)`; globals [g, e], locals [m, e], target [t, e], result [t, e].
    """

    def linear(row: Array, name: str) -> Array:
        return weights[f"{name}.weight"] @ row + weights[f"{name}.bias"]

    def norm(row: Array, name: str) -> Array:
        return layer_norm(row, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def each(rows: Array, function: str, name: str) -> Array:
        apply = linear if function == "linear" else norm
        return np.array([apply(row, name) for row in rows])

    rows, columns = grid
    width = weights["start"].shape[0]
    middle = (stride - 1) / 2
    cells = [
        (r + middle, c + middle) for r in range(0, rows, stride) for c in range(0, columns, stride)
    ]
    memory = [linear(g, "global_in") + weights["slots"][i] for i, g in enumerate(globals_)]
    memory += [
        linear(token, "local_in") + position(*cell, width)
        for token, cell in zip(locals_, cells, strict=True)
    ]
    memory = each(np.array(memory), "norm", "memory_norm")

    hidden = []
    for t in range(rows * columns):
        before = weights["start"] if t == 0 else linear(target[t - 1], "units_in.1")
        hidden.append(
            before + position(t // columns, t % columns, width) + weights["stride_embedding"][0]
        )
    hidden = np.array(hidden)

    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("stack.blocks."))
    for layer in range(depth):
        block = f"stack.blocks.{layer}"
        normed = each(hidden, "norm", f"{block}.self_norm")
        q, k, v = np.split(each(normed, "linear", f"{block}.self_attention.project"), 3, axis=1)
        mixed = multi_head_attention(q, k, v, heads, causal=True)
        hidden = hidden + each(mixed, "linear", f"{block}.self_attention.out")

        normed = each(hidden, "norm", f"{block}.cross_norm")
        q, _, _ = np.split(each(normed, "linear", f"{block}.cross_attention.project"), 3, axis=1)
        _, k, v = np.split(each(memory, "linear", f"{block}.cross_attention.project"), 3, axis=1)
        mixed = multi_head_attention(q, k, v, heads)
        hidden = hidden + each(mixed, "linear", f"{block}.cross_attention.out")

        normed = each(hidden, "norm", f"{block}.mlp_norm")
        inner = gelu(each(normed, "linear", f"{block}.mlp.inner"))
        hidden = hidden + each(inner, "linear", f"{block}.mlp.out")

    children = gelu(each(each(hidden, "norm", "out_norm"), "linear", "units_out.1"))
    return each(children, "linear", "predictor.out")
