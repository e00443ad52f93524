"""How a repeated step is run: plainly, with fixed shapes, compiled, or replayed as a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from unicompress.errors import InputError

# eager: shapes grow with the sequence, which is fastest where calls are cheap (CPU).
# fixed: every step has the same shapes and keeps its state in tensors: what the next two need, and
#        slower than eager by itself; there for tests and comparisons.
# compile: fixed, through torch.compile.
# graph: fixed, recorded once per image batch and replayed as a CUDA graph.
ENGINES = ("eager", "fixed", "compile", "graph")
WARM = 2  # steps run plainly before a recording: libraries allocate their workspaces in them

_current: ContextVar[str] = ContextVar("unicompress_engine", default="eager")


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Within the block, drawing and decompressing run their steps this way.

    The tokens are the same under every engine. Raises InputError for an unknown name.
    """
    if name not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def current_engine() -> str:
    """The engine of the innermost `use_engine` block; eager outside of any."""
    return _current.get()


def fixed_shapes() -> bool:
    """Whether the current engine needs steps of one shape."""
    return _current.get() != "eager"


def repeat(step: Callable[[], object], times: int, device: torch.device) -> None:
    """Run a step of fixed shapes, all of whose state is in tensors, under the current engine.

    Raises InputError for `graph` on another device than CUDA.
    """
    name = _current.get()
    if name == "graph":
        _replay(step, times, device)
        return
    run = torch.compile(step, dynamic=False) if name == "compile" else step
    for _ in range(times):
        run()


def _replay(step: Callable[[], object], times: int, device: torch.device) -> None:
    """The first steps plainly, then one recording (which runs nothing), then its replays."""
    if device.type != "cuda":
        raise InputError(f"the engine graph needs a CUDA device, got {device}: use eager")
    plainly = min(WARM, times)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(plainly):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    if times == plainly:
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(times - plainly):
        graph.replay()
    torch.cuda.synchronize(device)  # the graph's memory goes with it
