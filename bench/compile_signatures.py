"""Types and constants with which the launchers' arguments would specialise the Triton kernels."""

from __future__ import annotations

from typing import Any


def signature(
    kernel: Any, spec: Any, dtype: str, continues: bool = False
) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and attributes that the launcher's arguments would specialise to.

    Tensors are 16-byte aligned with a last stride of 1, as models pass them.

    Args:
        continues: A backward kernel's second segment of keys.
    """
    short = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
    aligned = [["tt.divisibility", 16]]
    pointers: dict[str, str | None] = {
        "out_ptr": short,
        "lse_ptr": "*fp32",
        "query_ptr": short,
        "key_ptr": short,
        "value_ptr": short,
        "prefix_key_ptr": short,
        "prefix_value_ptr": short,
        "d_out_ptr": short,
        "d_query_ptr": short,
        "d_key_ptr": short,
        "d_value_ptr": short,
        "delta_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "d_lse_ptr": None,
        "rest_ptr": None,  # of float32 alone
        "factor_ptr": "*fp32" if spec.has_key_factor else None,
        "bias_ptr": short if spec.has_bias else None,
        "padding_ptr": "*u8" if spec.has_padding else None,
        "mask_ptr": "*u8" if spec.has_mask else None,
        "sinks_ptr": short if spec.has_sinks else None,
        "seed_ptr": "*i64" if getattr(spec, "has_dropout", False) else None,
        "query_offset": "*i64" if spec.offset_in_memory else "i32",
    }
    packed = hasattr(spec, "stage")
    if packed and not spec.has_own:
        pointers["key_ptr"] = pointers["value_ptr"] = None
    backward = kernel.__name__.startswith("_attention_bwd")
    saves = (backward and spec.mode == "min_shift") or getattr(spec, "save_minimum", False)
    pointers["minimum_ptr"] = pointers["d_minimum_ptr"] = "*fp32" if saves else None
    pointers["argmin_ptr"] = "*i32" if saves else None
    pointers["d_factor_ptr"] = pointers["factor_ptr"]
    dense = backward and "_bias_" in kernel.__name__
    pointers["d_bias_ptr"] = short if dense else ("*fp32" if spec.has_bias else None)
    listed = spec.lists_tiles if packed else spec.mode == "min_shift" or spec.skip_plain
    lists = "*i32" if spec.has_key_factor and listed else None
    for name in ("before_ptr", "flagged_ptr", "tiles_ptr"):
        pointers[name] = pointers[f"prefix_{name}"] = lists
    for name in ("range_ptr", "prefix_range_ptr"):
        pointers[name] = "*i32" if spec.has_padding else None
    if packed:
        pointers["partial_ptr"] = pointers["stats_ptr"] = "*fp32" if spec.stage != "whole" else None
    counts = (
        "batch rows keys prefix_keys own_keys heads group splits state_rows factor_start window "
        "threshold first_column batches bias_heads shared_batches shared_heads "
        "stride_factor_batch stride_factor_head stride_bias_batch stride_bias_head stride_bias_row "
        "stride_padding_batch stride_mask_batch stride_mask_head stride_mask_row"
    )
    scalars = dict.fromkeys(counts.split(), "i32")
    scalars |= dict.fromkeys(("unit", "inner_scale", "keep_scale", "scale"), "fp32")
    if getattr(spec, "persistent", False):
        scalars |= dict.fromkeys(("lines", "section"), "i32")
    else:
        pointers["lines"] = pointers["section"] = None
    flags = {
        "STAGE": "minimum" if getattr(spec, "mode", "") == "min_shift" else "outputs",
        "HAS_D_LSE": False,
        "CONTINUES": continues,
        "FACTOR_PER_HEAD": False,
        "WANTS_FACTOR": spec.has_key_factor,
        "WANTS_BIAS": getattr(spec, "bias_per_key", False),
        "LINEAR": spec.mode == "multiplicative" and not spec.has_softcap,
    }
    strides = {
        "stride_out": 4,
        "stride_query": 4,
        "stride_key": 4,
        "stride_value": 4,
        "stride_prefix_key": 4,
        "stride_prefix_value": 4,
        "stride_factor": 3,
        "stride_tiles": 2,
        "stride_bias": 4,
        "stride_padding": 2,
        "stride_mask": 4,
        "stride_d_out": 4,
        "stride_d_query": 4,
        "stride_d_key": 4,
        "stride_d_value": 4,
        "stride_d_factor": 3,
        "stride_d_bias": 4 if dense else 3,
    }
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    unspecialised = {p.num for p in kernel.params if p.do_not_specialize}
    for index, name in enumerate(kernel.arg_names):
        if name in ("SPEC", "PREFIX"):
            types[name] = "constexpr"
            constants[(index,)] = spec
        elif name in flags:
            types[name] = "constexpr"
            constants[(index,)] = flags[name]
        elif name == "key_strides":  # 1 of what is there, else 0
            present = (spec.has_key_factor, spec.has_bias, spec.has_padding, spec.has_mask)
            types[name] = tuple("constexpr" if there else "i32" for there in present)
            for i, there in enumerate(present):
                (constants if there else attributes)[(index, i)] = 1 if there else aligned
        elif name in strides and pointers[name.replace("stride_", "") + "_ptr"] is None and packed:
            types[name] = ("i32",) * strides[name]
            attributes |= {(index, i): aligned for i in range(strides[name])}
        elif name in strides:
            inner = strides[name] - 1
            types[name] = ("i32",) * inner + ("constexpr",)
            constants[(index, inner)] = 1
            for i in range(inner):
                attributes[(index, i)] = aligned
        elif name in scalars:
            types[name] = scalars[name]
        else:
            pointer = pointers[name]
            types[name] = pointer or "constexpr"
            if pointer is None:
                constants[(index,)] = None
            elif pointer.startswith("*") and index not in unspecialised:
                attributes[(index,)] = aligned
    return types, constants, attributes
