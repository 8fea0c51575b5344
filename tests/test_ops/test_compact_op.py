import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from stamp_fast import ArgumentError, config
from stamp_fast.ops import compact_

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@st.composite
def cuts(draw) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """A tensor of any dtype and layout, and what stays of each dim."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]))
    tensor = torch.randint(0, 100, shape).to(dtype)
    if len(shape) == 4 and draw(st.booleans()):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    kept = [torch.randperm(n)[: draw(st.integers(1, n))].sort().values if draw(st.booleans()) else None for n in shape]
    return tensor, kept


@pytest.mark.parametrize("device", DEVICES)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(cuts(), min_size=0, max_size=6))
def test_equals_indexing(device, found):
    tensors = [tensor.to(device) for tensor, _ in found]
    kept = [[None if i is None else i.to(device) for i in one] for _, one in found]
    expected = []
    for tensor, one in zip(tensors, kept, strict=True):
        for dim, index in enumerate(one):
            tensor = tensor if index is None else tensor.index_select(dim, index)
        expected.append(tensor.clone())
    held = list(tensors)
    compact_(tensors, kept)
    for tensor, same, value in zip(tensors, held, expected, strict=True):
        assert tensor is same and tensor.dtype == value.dtype and torch.equal(tensor, value)


@pytest.mark.parametrize("device", DEVICES)
def test_a_layer_and_its_optimizer_go_on(device):
    conv = nn.Conv2d(6, 8, 3).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(conv.parameters(), 0.1, momentum=0.9)
    x = torch.randn(2, 6, 5, 5, device=device)
    conv(x).square().sum().backward()
    optimizer.step()
    rows, cols = torch.tensor([0, 3, 7], device=device), torch.tensor([1, 2], device=device)
    weight, state = conv.weight, optimizer.state[conv.weight]["momentum_buffer"]
    known = [t.detach()[rows][:, cols].clone() for t in (weight, weight.grad, state)]
    bias_state = optimizer.state[conv.bias]["momentum_buffer"]
    config.ran.clear()
    compact_([weight, state, conv.bias, bias_state], [[rows, cols, None, None]] * 2 + [[rows]] * 2)
    assert config.ran["pack_weights"] in ("cpu", "cuda", "reference")
    for found, value in zip((conv.weight, conv.weight.grad, state), known, strict=True):
        assert torch.equal(found, value)
    assert conv.weight is weight and weight.requires_grad and weight.is_leaf
    assert weight.is_contiguous(memory_format=torch.channels_last)
    conv(x[:, cols]).sum().backward()
    optimizer.step()
    assert conv.bias.shape == (3,)


def test_what_is_refused_changes_nothing():
    one, other = torch.randn(4, 3), torch.randn(5)
    before = one.clone()
    with pytest.raises(RuntimeError, match="must lie in"):
        compact_([one, other], [[torch.tensor([0]), None], [torch.tensor([5])]])
    assert torch.equal(one, before)
    with pytest.raises(ArgumentError, match=r"kept must hold \[2, 1\] entries"):
        compact_([one, other], [[None], [None]])
