"""One thread: small networks run no faster on two, and a busy machine makes two far slower."""

import pytest
import torch

from stamp_fast.graph import _replay


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture
def replays(monkeypatch) -> list[None]:
    """One entry for each replay."""
    done: list[None] = []
    original = _replay.compare
    monkeypatch.setattr(_replay, "compare", lambda *args: (done.append(None), original(*args))[1])
    return done
