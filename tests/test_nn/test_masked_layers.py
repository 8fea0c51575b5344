import copy

import pytest
import torch
from test_ops.test_masked_conv2d import needs_triton
from torch import nn

import stamp_fast
from stamp_fast import ArgumentError, config
from stamp_fast.nn import MaskedConv2d, MaskedConvBNReLU2d, MaskedLinear

GPU = "cuda" if torch.cuda.is_available() else "cpu"
CONVS = {
    "plain": ((6, 8, 3), {}),
    "same": ((6, 8, (3, 5)), {"padding": "same", "bias": False}),
    "even, same": ((6, 8, 4), {"padding": "same"}),
    "reflect": ((6, 8, 3), {"padding": 1, "padding_mode": "reflect", "stride": 2}),
    "dilated": ((6, 8, 3), {"dilation": 2, "padding": (2, 1)}),
    "grouped": ((6, 8, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((6, 6, 3), {"groups": 6, "padding": 1}),
}


def twin(layer: nn.Module, other: nn.Module) -> nn.Module:
    """`layer` with the state of `other`: keys and shapes are the same."""
    layer.load_state_dict(other.state_dict(), strict=True)
    assert layer.state_dict().keys() == other.state_dict().keys()
    return layer


@pytest.mark.parametrize(("args", "options"), CONVS.values(), ids=CONVS)
def test_without_a_mask_it_is_torchs_own(args, options, assert_close):
    plain = nn.Conv2d(*args, **options)
    x = torch.randn(2, 6, 9, 8)
    masked = twin(MaskedConv2d(*args, **options), plain)
    assert_close(masked(x), plain(x))
    assert masked.extra_repr() == plain.extra_repr()


def sliced(conv: nn.Conv2d, x: torch.Tensor, live_in: list[int], live_out: list[int], scale: torch.Tensor):
    weight = conv.weight[live_out][:, live_in] * scale.view(1, -1, 1, 1)
    return torch.conv2d(x[:, live_in], weight, conv.bias[live_out], conv.stride, conv.padding, conv.dilation)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("form", ["positions", "booleans"])
def test_masked_convolution(compact, form, assert_close):
    conv = MaskedConv2d(6, 8, 3, padding=1)
    live_in, live_out, scale = [1, 2, 5], [0, 3, 4, 7], torch.rand(3, requires_grad=True)
    x = torch.randn(2, 6, 9, 8)
    if form == "positions":
        conv.set_mask(live_in, torch.tensor(live_out), scale)
    else:
        conv.set_mask([i in live_in for i in range(6)], torch.tensor([o in live_out for o in range(8)]), scale)
    output = conv(x[:, live_in] if compact else x)
    expected = sliced(conv, x, live_in, live_out, scale)
    assert_close(output, expected)
    wanted = [conv.weight, conv.bias, scale]
    grad = torch.randn_like(output)
    for found, known in zip(
        torch.autograd.grad(output, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        assert_close(found, known)
    conv.set_mask()
    assert conv(x).shape[1] == 8


def test_masked_depthwise_convolution(assert_close):
    conv = MaskedConv2d(6, 6, 3, groups=6, padding=1)
    x = torch.randn(2, 6, 5, 5)
    expected = conv(x)[:, [4, 1]]
    conv.set_mask([4, 1], [4, 1])
    assert_close(conv(x), expected)
    assert_close(conv(x[:, [4, 1]]), expected)
    for arguments in (([0], [1]), ([0], None, torch.ones(1))):
        with pytest.raises(ArgumentError, match="depthwise"):
            conv.set_mask(*arguments)
    with pytest.raises(ArgumentError, match="only a depthwise convolution can be masked"):
        MaskedConv2d(6, 6, 3, groups=2).set_mask([0])


def test_masked_linear(assert_close):
    layer = twin(MaskedLinear(5, 4), nn.Linear(5, 4))
    x, scale = torch.randn(3, 2, 5), torch.rand(2)
    assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.set_mask([4, 0], [1, 2, 3], scale)
    expected = nn.functional.linear(x[..., [4, 0]] * scale, layer.weight[1:, [4, 0]], layer.bias[1:])
    assert_close(layer(x), expected)
    assert_close(layer(x[..., [4, 0]]), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([6],), "different positions in"),
        (([0, 0],), "different positions in"),
        (([True, False],), "must be 6 booleans"),
        (([],), "at least one"),
        (([0.5],), "positions or booleans"),
        (("03",), "positions or booleans"),
        (([5, 4, 3, 2, 1, 0],), "keeps all 6 channels in another order"),
        ((None, None, [1.0] * 6), "one factor for each of the 6 live input channels, got list"),
        ((None, None, torch.ones(5)), "one factor for each of the 6"),
    ],
)
def test_errors(arguments, text):
    conv = MaskedConv2d(6, 8, 3)
    with pytest.raises(ArgumentError, match=f"MaskedConv2d.set_mask: .*{text}"):
        conv.set_mask(*arguments)
    conv.set_mask([0, 1])
    with pytest.raises(ArgumentError, match="6 channels, or the 2 live ones"):
        conv(torch.randn(1, 5, 4, 4))


def block(bn: nn.BatchNorm2d | None = None) -> tuple[nn.Sequential, MaskedConvBNReLU2d]:
    plain = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, bias=False), bn or nn.BatchNorm2d(8), nn.ReLU())
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other = copy.deepcopy(plain)
    fused = MaskedConvBNReLU2d(*other)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    return plain, fused


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "bn",
    [
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
    ],
    ids=["usual", "cumulative", "not affine", "untracked"],
)
def test_fused_block_is_the_three_layers(training, bn, assert_close):
    plain, fused = block(copy.deepcopy(bn))
    plain.train(training), fused.train(training)
    for _ in range(2):
        x = torch.randn(4, 6, 5, 5, requires_grad=True)
        output, expected = fused(x), plain(x)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        grad = torch.randn_like(output)
        found = torch.autograd.grad(output, [x, *fused.parameters()], grad)
        known = torch.autograd.grad(expected, [x, *plain.parameters()], grad)
        for one, other in zip(found, known, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_fused_block_where_the_mean_is_far_larger_than_the_deviation(backend):
    plain = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    plain[0].bias.data = torch.tensor([0.0, 100.0, -300.0])
    fused = MaskedConvBNReLU2d(*copy.deepcopy(plain)).to(GPU if backend == "triton" else "cpu")
    x = torch.randn(8, 2, 16, 16)
    with config.use_backend(backend):
        output = fused(x.to(fused[0].weight.device)).cpu()
    torch.testing.assert_close(output, plain(x), rtol=0, atol=2e-3)  # with float32 sums 0.016


def test_fused_block_masked_with_residual():
    plain, fused = block()
    live_in, live_out = [0, 2, 3], [7, 1, 4, 5]
    fused.set_mask(live_in, live_out)
    x, residual = torch.randn(4, 6, 5, 5), torch.randn(4, 4, 5, 5)
    small = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    small.weight.data = plain[0].weight.data[live_out][:, live_in]
    norm = nn.BatchNorm2d(4)
    norm.weight.data, norm.bias.data = plain[1].weight.data[live_out], plain[1].bias.data[live_out]
    expected = (norm(small(x[:, live_in])) + residual).relu()
    torch.testing.assert_close(fused(x, residual), expected, rtol=1e-4, atol=1e-4)
    # Statistics of the dead stay as they were.
    untouched = torch.ones(8, dtype=torch.bool).index_fill(0, torch.tensor(live_out), False)
    assert torch.equal(fused[1].running_var[untouched], torch.ones(4))
    torch.testing.assert_close(fused[1].running_var[live_out], norm.running_var)


def test_left_to_the_next_block(assert_close):
    (_, first), second = block(), MaskedConvBNReLU2d(nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5))
    x = torch.randn(4, 6, 7, 7)
    expected = copy.deepcopy(second)(copy.deepcopy(first)(x))
    assert_close(second(first(x, unrectified=True)), expected)
    with pytest.raises(ArgumentError, match="residual"):
        first(x, torch.randn(4, 8, 7, 7), unrectified=True)
    second.set_mask([0, 1])
    with pytest.raises(ArgumentError, match="live channels of this layer"):
        second(first(x, unrectified=True))


def test_wrong_parts():
    conv, bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    hooked = copy.deepcopy(conv)
    hooked.register_forward_hook(lambda *_: None)
    normed = nn.utils.parametrizations.weight_norm(copy.deepcopy(conv))
    for parts, text in (
        ((nn.Linear(3, 3), bn), "conv must be a plain Conv2d, got Linear"),
        ((conv, nn.GroupNorm(2, 4)), "bn must be a plain BatchNorm2d, got GroupNorm"),
        ((conv, bn, nn.ReLU6()), "relu must be a plain ReLU, got ReLU6"),
        ((hooked, bn), "conv has hooks"),
        ((normed, bn), "conv must be a plain|conv has hooks"),
    ):
        with pytest.raises(ArgumentError, match=text):
            MaskedConvBNReLU2d(*parts)
    with pytest.raises(ArgumentError, match="the convolution's 4 channels, got 5"):
        MaskedConvBNReLU2d(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(5))


def test_same_padding_is_of_what_is_normalised(assert_close):
    (_, first), second = block(), MaskedConvBNReLU2d(nn.Conv2d(8, 5, 3, padding="same"), nn.BatchNorm2d(5))
    first[1].bias.data.fill_(1.0)
    x = torch.randn(4, 6, 7, 7)
    first.eval(), second.eval()
    assert_close(second(first(x, unrectified=True)), second(first(x)))


def test_empty_and_single_batches_leave_the_statistics_alone():
    _, fused = block()
    assert fused(torch.empty(0, 6, 5, 5)).shape == (0, 8, 5, 5)
    assert not fused[1].running_mean.any() and fused[1].running_var.eq(1).all()
    with pytest.raises(ArgumentError, match="more than 1 value per channel"):
        MaskedConvBNReLU2d(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))(torch.randn(1, 1, 3, 3))


def test_a_mask_is_no_parameter_and_no_ones_else(assert_close):
    conv, index = MaskedConv2d(3, 4, 1), torch.tensor([0, 1])
    conv.set_mask(index, None, nn.Parameter(torch.ones(2)))
    index[0] = 99
    assert conv.live_in.tolist() == [0, 1]
    assert conv.state_dict().keys() == dict(conv.named_parameters()).keys() == {"weight", "bias"}
    conv(torch.randn(1, 3, 2, 2)).sum().backward()
    assert conv.mask_scale.grad is not None
    deep = MaskedConv2d(4, 4, 1, groups=4)
    deep.set_mask([0, 1], [0, 1])
    with pytest.raises(ArgumentError):
        deep.set_mask([0, 1], [2, 3])
    assert deep.live_out.tolist() == [0, 1]  # what is refused changes nothing


def test_without_a_mask_whatever_torchs_own_takes():
    conv = MaskedConv2d(3, 4, 3)
    assert conv(torch.randn(3, 5, 5)).shape == (4, 3, 3)
    _, tangent = torch.func.jvp(conv, (torch.randn(1, 3, 5, 5),), (torch.ones(1, 3, 5, 5),))
    assert tangent.abs().sum() > 0


def test_prune_takes_networks_of_masked_layers():
    model = nn.Sequential(
        MaskedConv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        MaskedConv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        MaskedLinear(16, 4),
    )
    loader = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,)))] * 2
    stamp_fast.prune(model, loader, method="magnitude", budget=stamp_fast.Budget(channels=0.5), progress=False)
    assert model[0].out_channels == model[0].weight.shape[0] == 8 and model[6].in_features == 8


def network() -> nn.Sequential:
    net = nn.Sequential(
        MaskedConvBNReLU2d(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
        MaskedConv2d(8, 8, 3, groups=8, padding=1),
        MaskedConv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        MaskedLinear(6, 4),
    )
    net[0].set_mask(None, [0, 2, 5, 6])
    net[1].set_mask([0, 2, 5, 6], [0, 2, 5, 6])
    net[2].set_mask([0, 2, 5, 6], [1, 3, 4])
    net[5].set_mask([1, 3, 4])
    return net


def test_deepcopy_moves_and_state(assert_close):
    net, x = network(), torch.randn(2, 3, 6, 6)
    assert_close(copy.deepcopy(net)(x), net(x))
    assert not [key for key in net.state_dict() if "live" in key or "scale" in key]
    assert net.double()(x.double()).dtype == torch.float64
    assert net.to("meta")[2].live_in.device.type == "meta"


def test_compiles_without_a_graph_break():
    net, x = network(), torch.randn(2, 3, 6, 6)
    expected = copy.deepcopy(net)(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)


def test_exports(assert_close):
    net, x = network().eval(), torch.randn(2, 3, 6, 6)
    assert_close(torch.export.export(net, (x,)).module()(x), net(x))


def test_autocast():
    net, x = network(), torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert net[0][0].weight.grad.dtype == torch.float32


def gradients(net: nn.Module, rank: int) -> list[torch.Tensor]:
    torch.manual_seed(10 + rank)
    net(torch.randn(2, 3, 6, 6)).square().sum().backward()
    return [parameter.grad for parameter in net.parameters()]


def one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(network())
    torch.save(gradients(net, rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path, assert_close):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    net = network()
    alone = [gradients(copy.deepcopy(net), rank) for rank in range(2)]
    for one, other, *each in zip(first, second, *alone, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, sum(each) / 2, rtol=1e-4, atol=1e-5)
    head = first[-2]  # features 0, 2 and 5 are masked
    assert head[:, [0, 2, 5]].eq(0).all() and head[:, [1, 3, 4]].ne(0).any()
