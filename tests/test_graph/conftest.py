"""One thread: small networks run no faster on two, and a busy machine makes two far slower."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)
