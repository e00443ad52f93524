"""Rules of every test: no network, few threads, the same seeds, slow things only when asked for."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["COLUMNS"] = "200"  # rich wraps help texts at the width of the terminal

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

OPT_IN = ("slow", "gpu", "network")

# The first example of a property pays for lazy imports and torch's warm-up, so no deadline.
hypothesis.settings.register_profile(
    "unicompress", deadline=None, max_examples=25, derandomize=True
)
hypothesis.settings.load_profile("unicompress")


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in OPT_IN:
        parser.addoption(f"--{name}", action="store_true", help=f"also run tests marked {name}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in OPT_IN:
        if not config.getoption(f"--{name}"):
            for item in items:
                if name in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"marked {name}: add --{name}"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(max(1, min(2, int(os.environ.get("OMP_NUM_THREADS", "2")))))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same draws in every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail on any connection that leaves this machine; processes on it may talk (gloo)."""
    if request.node.get_closest_marker("network"):
        yield
        return
    connect = socket.socket.connect

    def only_local(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(
                f"a test tried to reach {address}: mark it network or fake the answer"
            )
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_local)
    yield


@pytest.fixture(scope="session")
def project() -> Path:
    """Root of the source tree."""
    return Path(__file__).resolve().parents[1]
