"""What `bench` prints: the ratio first, then the figures, then where the time goes."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unicompress.console import print_result

if TYPE_CHECKING:
    from unicompress.evals.result import Result


def print_bench(what: str, result: "Result") -> None:
    """One measurement, or a line for each of several shapes."""
    measured = result.details[what]
    if "growth" in measured:
        return _print_growth(what, measured["growth"])
    _print_one(what, result)
    _print_counts(measured)
    if "orders" in measured:
        _print_orders(measured["orders"])
    if "trained" in measured:
        _print_trained(measured)


def _print_one(what: str, result: "Result") -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from unicompress.evals.result import RATIOS

    console = Console()
    for key, value in result.ratio.items():
        if value is not None and key.endswith("seconds"):
            console.print(f"{key.replace('_', ' ')}: compressed / dense = {value:.3f}")
    print_result(result)
    dense, compressed = asdict(result.dense_breakdown), asdict(result.compressed_breakdown)
    table = Table("seconds", "dense", "compressed", "share of compressed")
    total = getattr(result.compressed, RATIOS.get(f"{what}_seconds", ""), None)
    for part, value in compressed.items():
        if value is not None:
            before = "-" if dense[part] is None else f"{dense[part]:.4f}"
            share = "-" if not total else f"{value / total:.1%}"
            table.add_row(part.replace("_", " "), before, f"{value:.4f}", share)
    if table.row_count:
        console.print(table)


def _print_counts(measured: Mapping[str, Any]) -> None:
    """Medians of all that took part, with arithmetic and memory where they were counted."""
    from rich.console import Console
    from rich.table import Table

    flops, peaks = measured.get("flops") or {}, measured.get("peak_bytes") or {}
    table = Table("", "median seconds", "GFLOP", "peak MiB beside the weights")
    for name, seconds in (measured.get("medians") or {}).items():
        gflop = f"{flops[name] / 1e9:.2f}" if name in flops else "-"
        peak = f"{peaks[name] / 2**20:.1f}" if name in peaks else "-"
        table.add_row(name.replace("_", " "), f"{seconds:.4f}", gflop, peak)
    if table.row_count:
        Console().print(table)


def _print_orders(orders: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("random weights", "time / raster", "parameters")
    for name, entry in orders.items():
        table.add_row(name, f"{entry['against_raster']:.3f}", f"{entry['parameters']:,}")
    Console().print(table)


def _print_trained(measured: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("trained", "order", "head", "PSNR (dB)", "whole caption", "parameters")
    for name, entry in measured["trained"].items():
        figures = (str(entry["psnr"]), str(entry["whole"]), f"{entry['parameters']:,}")
        table.add_row(name, entry["order"], entry["head"], *figures)
    console.print(table)
    if measured["differences"] is None:
        console.print(
            "for the quality cost of an order, repeat --compressed with a plug-in trained alike in "
            "raster order"
        )
        return
    for name, entry in measured["differences"].items():
        console.print(
            f"{name} minus {measured['against']} on the same {measured['pictures']} pictures: "
            f"{entry['psnr']} dB, whole caption {entry['whole']}; time ratio {entry['seconds']:.3f}"
        )


def _print_growth(what: str, table: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    key = {"training": "training_step_seconds"}.get(what, f"{what}_seconds")
    compared = "block / raster" if what == "decompressor" else "compressed / dense"
    shown = Table("language model", "tokens", "batch", compared, "dense (first = 1)")
    first = table[0]["dense"].get(key)
    for entry in table:
        tokens = f"{entry['dense']['tokens_per_image']:,} -> "
        tokens += f"{entry['compressed']['tokens_per_image']:,}"
        orders, ratio = entry["orders"], entry["ratio"].get(key)
        ratio = orders["block/codes"]["against_raster"] if orders else ratio
        dense = entry["dense"].get(key)
        shown.add_row(
            entry["lm"] or "of the models",
            tokens,
            str(entry["batch"]),
            "-" if ratio is None else f"{ratio:.3f}",
            f"{dense / first:.2f}" if dense and first else "-",
        )
    Console().print(shown)
