"""Sums over samples of products of matrices: values, strides, devices, errors, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clext import ops, reference

every_module = pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
every_function = pytest.mark.parametrize("function", ["square", "absolute", "identity"])
# Written out once more, for what is expected.
WRITTEN = {"square": lambda a: a * a, "absolute": abs, "identity": lambda a: a}


def normal(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)


def one_by_one(features, grads, function):
    """One sample, one group at a time, from flattened rows."""
    samples, groups, outputs = grads.shape[:3]
    grads = grads.reshape(samples, groups, outputs, -1)
    features = features.reshape(samples, groups, -1, grads.shape[-1])
    sums = grads.new_zeros(groups, features.shape[2], outputs)
    for sample in range(samples):
        for group in range(groups):
            product = features[sample, group] @ grads[sample, group].T
            sums[group] += WRITTEN[function](product)
    return sums


@every_module
def test_autocast_changes_nothing(module, device):
    features, grads = normal(4, 1, 5, 6, device=device), normal(4, 1, 3, 6, device=device)
    features, grads = features.float(), 1e-5 * grads.float()
    expected = module.per_sample_sum(features, grads)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(module.per_sample_sum(features, grads), expected)


@every_module
@every_function
@pytest.mark.parametrize(
    ("inputs", "outputs", "rows"),
    [((5,), 3, (4,)), ((17,), 35, (6,)), ((2, 3, 3), 16, (2, 4, 5)), ((), 1, ()), ((9,), 10, ())],
    ids=str,
)
def test_sums_of_each_sample(module, function, inputs, outputs, rows, device):
    features = normal(6, 2, *inputs, *rows)
    grads = normal(6, 2, outputs, *rows, seed=1)
    expected = one_by_one(features, grads, function)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        arguments = (features.to(device, dtype), grads.to(device, dtype))
        got = module.per_sample_sum(*arguments, function=function)
        assert got.dtype == dtype
        assert got.device.type == device
        torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


@every_module
@every_function
def test_windows_of_a_convolution_are_read_in_place(module, function, device):
    """The features are a view in which entries overlap; rows are strided."""
    images, g = normal(4, 3, 9, 8), normal(4, 5, 4, 3, seed=1)
    sample, channel, row, column = images.stride()
    windows = images.to(device).as_strided(
        (4, 1, 3, 3, 3, 4, 3), (sample, 0, channel, row, column, 2 * row, 2 * column)
    )
    got = module.per_sample_sum(windows, g.to(device).unsqueeze(1), function=function)
    weight = torch.zeros(5, 3, 3, 3, dtype=torch.float64)
    for image, grad in zip(images, g, strict=True):
        leaf = torch.zeros_like(weight, requires_grad=True)
        (F.conv2d(image[None], leaf, stride=2) * grad).sum().backward()
        weight += WRITTEN[function](leaf.grad)
    torch.testing.assert_close(got[0].T.reshape(weight.shape).cpu(), weight)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0)], ids=str)
def test_any_strides(order, device):
    features, grads = normal(3, 2, 5, 7), normal(3, 2, 19, 7, seed=1)

    def laid_out(tensor):
        moved = tensor.permute(order).contiguous()
        return moved.permute([order.index(d) for d in range(4)]).to(device)

    expected = one_by_one(features, grads, "square")
    got = ops.per_sample_sum(laid_out(features), laid_out(grads))
    torch.testing.assert_close(got.cpu(), expected)


@every_module
@pytest.mark.parametrize("empty", [0, 1, 2, 3], ids=["samples", "groups", "outputs", "rows"])
def test_nothing_to_add_up(module, empty, device):
    shape = [3, 2, 4, 5]
    shape[empty] = 0
    features = normal(*shape[:2], 6, shape[3], device=device)
    got = module.per_sample_sum(features, normal(*shape, device=device))
    assert got.shape == (shape[1], 6, shape[2])
    assert not got.any()


@every_module
def test_a_sample_that_is_not_finite_shows(module, device):
    features, grads = normal(3, 1, 4, 2, device=device), normal(3, 1, 5, 2, device=device)
    features[1, 0, 2, 0] = torch.nan
    got = module.per_sample_sum(features, grads)
    assert got[0, 2].isnan().all()
    assert got[0, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("contiguous", [False, True])
def test_same_bits_on_any_number_of_threads(contiguous):
    features = normal(16, 2, 40, 30, dtype=torch.float32)
    grads = normal(16, 2, 50, 30, dtype=torch.float32, seed=1)
    if contiguous:  # entries next to each other
        grads = grads.transpose(2, 3).contiguous().transpose(2, 3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(ops.per_sample_sum(features, grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(entry, found[0]) for entry in found)


def test_schema_shapes_and_tracing(device):
    arguments = normal(3, 2, 4, 3, 5, device=device), normal(3, 2, 6, 5, device=device)
    torch.library.opcheck(
        torch.ops.clext.per_sample_sum.default, arguments, {"function": "absolute"}
    )
    parameter = arguments[1].clone().requires_grad_()
    assert not ops.per_sample_sum(arguments[0], parameter).requires_grad


F64, F32 = torch.float64, torch.float32
BAD = {
    "grads without outputs": (
        lambda: (normal(3, 2, 4), normal(3, 2)),
        ValueError,
        r"grads has shape \[3, 2\], expected \[samples, groups, outputs, \*rows\]",
    ),
    "another number of samples": (
        lambda: (normal(2, 1, 4, 5), normal(3, 1, 6, 5)),
        ValueError,
        r"features has shape \[2, 1, 4, 5\], expected \[samples, groups, \*inputs, \*rows\]",
    ),
    "other rows": (
        lambda: (normal(3, 1, 4, 2), normal(3, 1, 6, 5)),
        ValueError,
        r"with the samples, groups and rows of grads, which has shape \[3, 1, 6, 5\]",
    ),
    "too few dimensions": (
        lambda: (normal(3, 5), normal(3, 5, 6, 5)),
        ValueError,
        r"features has shape \[3, 5\], expected",
    ),
    "half precision": (
        lambda: (normal(3, 1, 4, dtype=torch.float16), normal(3, 1, 6)),
        TypeError,
        "features has dtype float16, expected float32 or float64",
    ),
    "two dtypes": (
        lambda: (normal(3, 1, 4, dtype=F32), normal(3, 1, 6, dtype=F64)),
        TypeError,
        r"features has dtype float32, expected float64 \(that of grads\)",
    ),
}


def test_an_unknown_function_is_named():
    expected = "function is 'cube', expected 'square', 'absolute' or 'identity'"
    with pytest.raises(ValueError, match=expected):
        ops.per_sample_sum(normal(3, 1, 4), normal(3, 1, 6), function="cube")


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    make, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        ops.per_sample_sum(*make())


def test_a_mix_with_the_meta_device_is_refused():
    features, grads = normal(3, 1, 4), normal(3, 1, 6)
    with pytest.raises(ValueError, match="there are tensors on cpu and meta, expected one"):
        ops.per_sample_sum(features.to("meta"), grads)
    assert ops.per_sample_sum(features.to("meta"), grads.to("meta")).shape == (1, 4, 6)
