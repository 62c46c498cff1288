"""The steering op and guidance, as both engines launch them."""

from __future__ import annotations

from typing import Any

from compiling import Case

from trimtab.kernels.guidance_triton import launched
from trimtab.kernels.steer_triton import warps

STEER, GUIDE = "trimtab.kernels.steer_triton", "trimtab.kernels.guidance_triton"
WIDEST = 16384


def cases() -> list[Case]:
    """Return all of them."""
    return [
        _steer(4096, "bf16", is_stream=False),
        _steer(4096, "bf16", is_stream=True, is_gated=False),
        _steer(1536, "fp16", is_stream=False, is_gated=False),
        _steer(8192, "bf16", is_stream=True, is_gated=False),
        _steer(WIDEST, "bf16", is_stream=True),
        _steer(WIDEST, "fp32", is_stream=True, is_gated=False),
        _shift(4096),
        _keep_norm(WIDEST),
        _steps((256, 256, 6), loss="softmax", step="unit"),
        _steps((128, 128, 64), loss="sigmoid", step="reflect"),
        _steps((1024, 1024, 64), loss="softmax", step="reflect", is_gated=False),
        _steps((20, 0, 20), loss="softmax", step="unit", is_gated=False),
        _steps((64, 0, 64), loss="logits", step="bare", is_gated=False),
        _apply(4096, 256, "bf16"),
        _apply(4096, 20, "fp32", is_gated=False),
        _apply(WIDEST, 1024, "fp16", is_gated=False),
    ]


def _steer(width: int, kind: str, *, is_stream: bool, is_gated: bool = True) -> Case:
    block = _power_of_2(width)
    states = ("hidden", "residual", "out")
    return Case(
        name=f"steer {width} {kind}{' in place, gates' if is_stream else ''}",
        kernel=f"{STEER}:_steer",
        arguments={
            **dict.fromkeys(states, f"*{kind}"),
            **dict.fromkeys(("slots", "row_of", "low_of"), "*i64"),
            **dict.fromkeys(("gates", "rows", "low_a", "low_b"), "*fp32"),
            "norm": "*i1",
            **{f"{name}_token": "i32" for name in (*states, "slots", "gates")},
        },
        constants={
            **{f"{name}_entry": 1 for name in states},
            "slots_part": 1,
            "gates_part": 1,
            "WIDTH": width,
            "N_PARTS": 4,
            "RANK": 8,
            "RANK_BLOCK": 8,
            "HAS_LOW_RANK": True,
            "HAS_NORM": True,
            "HAS_GATES": is_stream,
            "HAS_RESIDUAL": is_stream,
            "IS_IN_PLACE": is_stream,
            "BLOCK": block,
        },
        aligned=(*states, "rows", "low_a", "low_b", *(f"{name}_token" for name in states)),
        warps=warps(block),
        is_gated=is_gated,
    )


def _shift(width: int) -> Case:
    block = _power_of_2(width)
    rows = ("h", "change", "out")
    return Case(
        name=f"shift {width}",
        kernel=f"{STEER}:_shift",
        arguments={
            **dict.fromkeys(rows, "*fp32"),
            "asked": "*i1",
            **{f"{name}_token": "i32" for name in rows},
        },
        constants={
            **{f"{name}_entry": 1 for name in rows},
            "asked_token": 1,
            "WIDTH": width,
            "KEEPS_NORM": True,
            "IS_ASKED": True,
            "BLOCK": block,
        },
        aligned=(*rows, *(f"{name}_token" for name in rows)),
        warps=warps(block),
        is_gated=False,
    )


def _keep_norm(width: int) -> Case:
    block = _power_of_2(width)
    return Case(
        name=f"guide's norm {width}",
        kernel=f"{STEER}:keep_norm",
        arguments={
            "h": "*bf16",
            "changed": "*fp32",
            "asked": "*i1",
            "out": "*bf16",
            "h_token": "i32",
        },
        constants={"h_entry": 1, "asked_token": 1, "WIDTH": width, "BLOCK": block},
        aligned=("h", "changed", "out", "h_token"),
        warps=warps(block),
        is_gated=False,
    )


def _steps(widths: tuple[int, int, int], *, loss: str, step: str, is_gated: bool = True) -> Case:
    d_in, d_mid, n_labels = widths
    rows = ("z", "total", "inner", "back", "u", "moved")
    weights = ("b_in", "gram", "w_mid", "b_mid", "w_out", "b_out")
    constants: dict[str, Any] = {
        "toward_label": 1,
        "away_label": 1,
        "sizes_step": 1,
        "rival_token": 1,
        "until_token": 1,
        "D_IN": d_in,
        "D_MID": d_mid or d_in,
        "N_LABELS": n_labels,
        "LOSS": loss,
        "STEP": step,
        "IS_LINEAR": not d_mid,
        "IS_EXCLUSIVE": loss == "softmax",
        "HAS_RIVAL": True,
        "HAS_UNTIL": True,
    }
    constants |= launched(d_in=d_in, d_mid=d_mid or d_in, n_labels=n_labels)
    n_warps = constants.pop("num_warps")
    return Case(
        name=f"guide's steps {d_in}-{d_mid}-{n_labels} {loss} {step}",
        kernel=f"{GUIDE}:_steps",
        arguments={
            **dict.fromkeys((*rows, *weights, "sizes", "until"), "*fp32"),
            **dict.fromkeys(("toward", "away", "picks_rival"), "*i1"),
            **dict.fromkeys(("n_tokens", "n_steps"), "i32"),
            **dict.fromkeys(("toward_token", "away_token", "sizes_token"), "i32"),
        },
        constants=constants,
        aligned=(*rows, *weights),
        warps=n_warps,
        is_gated=is_gated,
    )


def _apply(width: int, d_in: int, kind: str, *, is_gated: bool = True) -> Case:
    constants: dict[str, Any] = {"hidden_entry": 1, "sizes_step": 1, "D_IN": d_in, "WIDTH": width}
    constants |= launched(d_in=d_in)
    n_warps = constants.pop("num_warps")
    return Case(
        name=f"guide's change {d_in} to {width} {kind}",
        kernel=f"{GUIDE}:_apply",
        arguments={
            **dict.fromkeys(("hidden", "out"), f"*{kind}"),
            **dict.fromkeys(("total", "w_in", "sizes"), "*fp32"),
            **dict.fromkeys(("n_tokens", "n_steps", "hidden_token", "sizes_token"), "i32"),
        },
        constants=constants,
        aligned=("hidden", "out", "total", "w_in", "hidden_token"),
        warps=n_warps,
        has_product=d_in > 32,  # or there is no loop to look at
        is_gated=is_gated,
    )


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
