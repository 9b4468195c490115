"""Skinny matrix products against float64, in Triton's interpreter."""

import os

import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)

from kernels.skinny_gemm import GemmConfig, skinny_gated_product, skinny_linear

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
torch.set_num_threads(1)


def problem(rows: int, width: int, depth: int):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, depth, generator=generator).half() for n in (rows, width))
    return x, weight, torch.randn(width, generator=generator).half()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 20, 256), (3, 9, 384), (4, 8, 128)])
def test_without_tensor_cores(rows, width, depth, biased):
    x, weight, bias = problem(rows, width, depth)
    got = skinny_linear(x, weight, bias if biased else None, GemmConfig(4, 128, 4))
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    torch.testing.assert_close(got.double(), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("split", [1, 3, 5])
@pytest.mark.parametrize(("rows", "width", "depth"), [(1, 48, 256), (17, 40, 256), (130, 24, 256)])
def test_on_tensor_cores(rows, width, depth, split, biased):
    """The width is no multiple of the tile, and the last of the spans may be empty."""
    x, weight, bias = problem(rows, width, depth)
    got = skinny_linear(x, weight, bias if biased else None, GemmConfig(32, 64, 4, split, 3))
    exact = x.double() @ weight.double().T + (bias.double() if biased else 0)
    torch.testing.assert_close(got.double(), exact, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("config", [GemmConfig(4, 128, 4), GemmConfig(2, 64, 1), GemmConfig(32, 64, 4, 1, 3)], ids=str)
def test_gates_and_values_of_one_product(config, biased):
    """The number of gates is no multiple of the tile: values must not be taken for gates."""
    for rows, width in ((1, 21), (4, 8)) if config.split == 0 else ((1, 21), (19, 40)):
        x, weight, bias = problem(rows, 2 * width, 256)
        got = skinny_gated_product(x, weight, bias if biased else None, config)
        gate, up = (x.double() @ weight.double().T + (bias.double() if biased else 0)).chunk(2, -1)
        torch.testing.assert_close(got.double(), F.silu(gate) * up, atol=4e-3, rtol=4e-3)


def test_a_gated_product_is_not_cut():
    x, weight, _ = problem(4, 16, 256)
    with pytest.raises(ValueError, match="not cut"):
        skinny_gated_product(x, weight, None, GemmConfig(32, 64, 4, 2, 3))


def test_a_row_has_the_same_bits_in_every_batch():
    x, weight, _ = problem(20, 32, 256)
    config = GemmConfig(32, 64, 4, 2, 3)
    together = skinny_linear(x, weight, None, config)
    for row in (0, 19):
        assert torch.equal(skinny_linear(x[row : row + 1], weight, None, config)[0], together[row])
