"""The op: bad input is refused by name, with the whole text of each error."""

import re

import pytest
import torch
from test_attention import FACTOR, KEY, PREFIX, QUERY, VALUE, inputs

from atman_triton import attention

# name: (arguments replaced, error, its whole text)
BAD = {
    "query-dim": (
        {"query": QUERY[0]},
        ValueError,
        "query must have 4 dimensions [batch, heads, tokens, dim], got shape [4, 6, 16].",
    ),
    "query-dtype": (
        {"query": QUERY.int()},
        TypeError,
        "query must have a floating dtype, got torch.int32.",
    ),
    "query-type": ({"query": [1.0]}, TypeError, "query must be a tensor, got list."),
    "key-dtype": (
        {"key": KEY.half()},
        TypeError,
        "key must have query's dtype torch.float32, got torch.float16.",
    ),
    "key-batch": (
        {"key": KEY.repeat(2, 1, 1, 1)},
        ValueError,
        "key must have batch 2 or 1, got 4.",
    ),
    "key-dim": ({"key": KEY[..., :8]}, ValueError, "key must have query's head dim 16, got 8."),
    "value-tokens": (
        {"value": VALUE[:, :, 1:]},
        ValueError,
        "value must have key's heads and tokens [2, 9], got [2, 8].",
    ),
    "heads": (
        {"query": QUERY[:, :3]},
        ValueError,
        "query heads must be a multiple of key heads, got 3 and 2.",
    ),
    "factor-shape": (
        {"key_factor": FACTOR[:, :5]},
        ValueError,
        "key_factor must have shape [2, 9] or [2, 4, 9], got [2, 5].",
    ),
    "factor-half": (
        {"key_factor": FACTOR.half()},
        TypeError,
        "key_factor must be torch.float32, got torch.float16; use key_factor.float().",
    ),
    "factor-double": (
        {"key_factor": FACTOR.double()},
        TypeError,
        "key_factor must be torch.float32, got torch.float64; use key_factor.float().",
    ),
    "factor-device": (
        {"key_factor": FACTOR.to("meta")},
        ValueError,
        "key_factor must be on query's device cpu, got meta.",
    ),
    "key-device": (
        {"key": KEY.to("meta")},
        ValueError,
        "key must be on query's device cpu, got meta.",
    ),
    "value-device": (
        {"value": VALUE.to("meta"), "backend": "triton"},
        ValueError,
        "value must be on query's device cpu, got meta.",
    ),
    "no-heads": (
        {"query": QUERY[:, :0]},
        ValueError,
        "query heads must be a multiple of key heads, got 0 and 2.",
    ),
    "no-value-dim": (
        {"value": VALUE[..., :0]},
        ValueError,
        "value must have a head dim of at least 1, got 0.",
    ),
    "causal": ({"causal": "no"}, TypeError, "causal must be True or False, got 'no'."),
    "window-type": ({"window": 1.5}, TypeError, "window must be an int, got 1.5."),
    "window-bool": ({"window": True}, TypeError, "window must be an int, got True."),
    "offset-type": ({"query_offset": 1.5}, TypeError, "query_offset must be an int, got 1.5."),
    "softcap-type": ({"softcap": "a"}, TypeError, "softcap must be a number, got 'a'."),
    "scale-type": ({"scale": "a"}, TypeError, "scale must be a number, got 'a'."),
    "sinks-dtype": (
        {"sinks": torch.zeros(4, dtype=torch.int)},
        TypeError,
        "sinks must have a floating dtype, got torch.int32.",
    ),
    "mode": (
        {"mode": "add"},
        ValueError,
        "mode must be one of multiplicative, min_shift, min_shift_full, log_additive, got 'add'.",
    ),
    "backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of auto, triton, hopper, torch, reference, got 'cuda'.",
    ),
    "window": ({"window": 0}, ValueError, "window must be at least 1 token, got 0."),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be greater than 0, got 0.0."),
    "sinks": ({"sinks": torch.zeros(2)}, ValueError, "sinks must have shape [4], got [2]."),
    "bias-shape": (
        {"position_bias": torch.zeros(1, 4, 6, 8)},
        ValueError,
        "position_bias must broadcast to [2, 4, 6, 9], got [1, 4, 6, 8].",
    ),
    "bias-dtype": (
        {"position_bias": torch.zeros(1, 4, 6, 9, dtype=torch.int)},
        TypeError,
        "position_bias must have a floating dtype, got torch.int32.",
    ),
    "mask-dtype": (
        {"mask": torch.ones(2, 9)},
        TypeError,
        "mask must be torch.bool (True = visible), got torch.float32.",
    ),
    "mask-padding": (
        {"mask": torch.ones(2, 6, dtype=torch.bool)},
        ValueError,
        "mask must have shape [2, 9] or [2, 4, 6, 9], got [2, 6].",
    ),
    "mask-dense": (
        {"mask": torch.ones(2, 1, 1, 9, dtype=torch.bool)},
        ValueError,
        "mask must have shape [2, 4, 6, 9], got [2, 1, 1, 9].",
    ),
    "offset": (
        {"query_offset": torch.tensor(0.5)},
        ValueError,
        "query_offset must be an int or an integer tensor of one element, "
        "got torch.float32 of shape [].",
    ),
    "dropout-type": ({"dropout": "a"}, TypeError, "dropout must be a number, got 'a'."),
    "dropout-bool": ({"dropout": True}, TypeError, "dropout must be a number, got True."),
    "dropout-one": (
        {"dropout": 1.0},
        ValueError,
        "dropout must be at least 0 and less than 1, got 1.0.",
    ),
    "dropout-negative": (
        {"dropout": -0.1},
        ValueError,
        "dropout must be at least 0 and less than 1, got -0.1.",
    ),
    "dropout-nan": (
        {"dropout": float("nan")},
        ValueError,
        "dropout must be at least 0 and less than 1, got nan.",
    ),
    "seed-type": ({"dropout_seed": 1.5}, TypeError, "dropout_seed must be an int, got 1.5."),
    "seed-size": (
        {"dropout_seed": 1 << 63},
        ValueError,
        "dropout_seed must fit in 64 bits with sign, got 9223372036854775808.",
    ),
    "seed-dtype": (
        {"dropout_seed": torch.zeros(1)},
        ValueError,
        "dropout_seed must be an int or a torch.int64 tensor of one element, "
        "got torch.float32 of shape [1].",
    ),
    "seed-shape": (
        {"dropout_seed": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        "dropout_seed must be an int or a torch.int64 tensor of one element, "
        "got torch.int64 of shape [2].",
    ),
    "seed-device": (
        {"dropout_seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        "dropout_seed must be on query's device cpu, got meta.",
    ),
    "full-triton": (
        {"mode": "min_shift_full", "backend": "triton"},
        ValueError,
        "backend='triton' cannot serve mode='min_shift_full'; use backend='torch'.",
    ),
    "prefix-type": (
        {"prefix": [PREFIX[0], PREFIX[1]]},
        TypeError,
        "prefix must be a tuple (key, value), got list.",
    ),
    "prefix-length": (
        {"prefix": (*PREFIX, None)},
        TypeError,
        "prefix must be a tuple (key, value), got a tuple of 3.",
    ),
    "prefix-tensor": (
        {"prefix": (PREFIX[0], None)},
        TypeError,
        "prefix value must be a tensor, got NoneType.",
    ),
    "prefix-device": (
        {"prefix": (PREFIX[0].to("meta"), PREFIX[1])},
        ValueError,
        "prefix key must be on query's device cpu, got meta.",
    ),
    "prefix-dtype": (
        {"prefix": (PREFIX[0], PREFIX[1].half())},
        TypeError,
        "prefix value must have query's dtype torch.float32, got torch.float16.",
    ),
    "prefix-key-dim": (
        {"prefix": (PREFIX[0][..., :8], PREFIX[1])},
        ValueError,
        "prefix key must have shape [1, 2, Tp, 16], got [1, 2, 5, 8].",
    ),
    "prefix-key-rank": (
        {"prefix": (PREFIX[0][0], PREFIX[1])},
        ValueError,
        "prefix key must have shape [1, 2, Tp, 16], got [2, 5, 16].",
    ),
    "prefix-key-batch": (
        {"prefix": tuple(t.expand(2, -1, -1, -1) for t in PREFIX)},
        ValueError,
        "prefix key must have shape [1, 2, Tp, 16], got [2, 2, 5, 16].",
    ),
    "prefix-value-tokens": (
        {"prefix": (PREFIX[0], PREFIX[1][:, :, 1:])},
        ValueError,
        "prefix value must have shape [1, 2, 5, 16], got [1, 2, 4, 16].",
    ),
    "prefix-factor": (
        {"prefix": PREFIX, "key_factor": FACTOR[:, :5]},
        ValueError,
        "key_factor must have shape [2, 14] or [2, 4, 14], or [2, 9] or [2, 4, 9] without the "
        "prefix, got [2, 5].",
    ),
    "prefix-mask": (
        {"prefix": PREFIX, "mask": torch.ones(2, 9, dtype=torch.bool)},
        ValueError,
        "mask must have shape [2, 14] or [2, 4, 6, 14], got [2, 9].",
    ),
    "prefix-bias": (
        {"prefix": PREFIX, "position_bias": torch.zeros(1, 4, 6, 9)},
        ValueError,
        "position_bias must broadcast to [2, 4, 6, 14], got [1, 4, 6, 9].",
    ),
    "double-triton": (
        {
            "query": QUERY.double(),
            "key": KEY.double(),
            "value": VALUE.double(),
            "backend": "triton",
        },
        ValueError,
        "backend='triton' serves fp16, bf16 and fp32, got torch.float64; use backend='torch'.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    replaced, error, text = BAD[name]
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, "key_factor": FACTOR} | replaced
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        attention(**arguments)


def test_head_dim_too_large_for_triton():
    query, key, value, factor = inputs(dim=260)
    with pytest.raises(ValueError, match="serves head dims up to 256, got 260"):
        attention(query, key, value, factor, backend="triton")


def test_triton_without_gpu_or_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"needs a GPU or the interpreter \(TRITON_INTERPRET=1\)"):
        attention(*inputs(), backend="triton")
