"""An attention allocation as tables of a result file."""

from collections.abc import Mapping
from typing import Any

from unicompress.limits.attention import Allocation

KINDS = (("all tokens", True), ("without the first token", False))


def allocation_tables(allocations: Mapping[str, Allocation], asked: str) -> list[dict[str, Any]]:
    """Shares of the segments in each layer, one table per allocation and way of counting."""
    return [
        {
            "title": f"Attention in {name}, {label}",
            "note": f"Where the queries of `{asked}` look, mean over heads and queries.",
            "columns": ["layer", *allocation.names],
            "rows": [
                [str(number), *shares]
                for number, shares in enumerate(allocation.share(asked, sink=sink).tolist())
            ],
        }
        for name, allocation in allocations.items()
        for label, sink in KINDS
    ]


def allocation_details(allocations: Mapping[str, Allocation], asked: str) -> dict[str, Any]:
    """`details` of a result file: what was measured, and its tables."""
    return {
        "title": "Attention allocation",
        "note": "Shares of attention by layer and segment (arXiv 2606.01503, eq. 2, as a mean over "
        "queries). The first token is the attention sink.",
        "attention": {name: found.summary(asked) for name, found in allocations.items()},
        "tables": allocation_tables(allocations, asked),
    }
