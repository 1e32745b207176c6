"""What only a GPU can show of a call: capture, compilation of a whole graph, far addresses.

Legend: B batch, Hq/Hk heads, Tq/Tk tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, MODES

from atman_triton.attention import attention
from atman_triton.testing import assert_close_to_oracle, count_launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU"),
]
DTYPES = (torch.bfloat16, torch.float16)


def drawn(queries: int, keys: int, dtype: torch.dtype, seed: int = 0) -> list[Any]:
    """Query ``[2, 4, Tq, 64]``, key and value of 2 heads, key_factor ``[2, Tk]``."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    factor = torch.rand(2, keys, generator=generator, device=DEVICE)
    return [randn(2, 4, queries, 64), randn(2, 2, keys, 64), randn(2, 2, keys, 64), factor]


@pytest.mark.parametrize("queries", [300, 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_call_can_be_captured(mode: str, queries: int) -> None:
    """And replayed on other numbers, as decoding does."""
    tensors = drawn(queries, 300, torch.bfloat16)

    def call() -> torch.Tensor:
        return attention(*tensors, mode=mode, causal=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # kernels are compiled here
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    first = captured.clone()
    for tensor, other in zip(tensors, drawn(queries, 300, torch.bfloat16, seed=1), strict=True):
        tensor.copy_(other)
    graph.replay()
    assert torch.equal(captured, call())
    assert not torch.equal(captured, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_a_whole_graph_compiles_with_gradients(mode: str, dtype: torch.dtype) -> None:
    compiled = torch.compile(
        lambda *given: attention(*given, mode=mode, causal=True).sin(), fullgraph=True
    )
    found = {}
    for name, function in (
        ("compiled", compiled),
        ("eager", lambda *given: attention(*given, mode=mode, causal=True).sin()),
    ):
        given = [tensor.requires_grad_() for tensor in drawn(130, 200, dtype)]
        with count_launches() as launches:
            output = function(*given)
            output.float().square().sum().backward()
        assert launches.attention
        found[name] = [output, *(tensor.grad for tensor in given)]
    for ours, expected in zip(*found.values(), strict=True):
        step = torch.finfo(ours.dtype).eps * float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=2 * step)


@pytest.mark.parametrize("mode", MODES)
def test_addresses_beyond_32_bits(mode: str) -> None:
    """More than 2^31 numbers in keys and values each; a window reads the last of them."""
    keys, last = 2**24 + 512, 256
    need = 3 * keys * 128 * 2 + 2 * keys * 4
    if torch.cuda.mem_get_info()[0] < 1.2 * need:
        pytest.skip("needs 16 GB of free memory")
    generator = torch.Generator(DEVICE).manual_seed(0)
    # whole: uninitialised numbers in front would be NaN, which a wrong address then shows
    key, value = (
        torch.full((1, 1, keys, 128), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(2)
    )
    for tensor in (key, value):
        tensor[:, :, -last:] = torch.randn(1, 1, last, 128, generator=generator, device=DEVICE)
    query = torch.randn(1, 2, 64, 128, generator=generator, device=DEVICE).bfloat16()
    factor = torch.ones(1, keys, device=DEVICE)
    factor[:, -last:] = torch.rand(1, last, generator=generator, device=DEVICE)
    options: dict[str, Any] = {"mode": mode, "causal": True, "window": 100}
    found = attention(query, key, value, factor, backend="triton", **options)
    near = (query, key[:, :, -last:], value[:, :, -last:], factor[:, -last:])
    eager = attention(*near, backend="reference", **options)
    truth = attention(*(tensor.double() for tensor in near), backend="reference", **options)
    assert_close_to_oracle(found, eager, truth)
