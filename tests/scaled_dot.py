"""`tl.dot_scaled` on a CPU, for Triton's interpreter, which has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trimtab.kernels.formats import e2m1, nibbles, powers


def install() -> None:
    """Teach the interpreter products of E2M1 and E4M3 under E8M0 scales along the columns."""
    import triton.language as tl
    from triton.runtime import interpreter

    def operand(tensor: Any, scales: Any, kind: str, *, is_first: bool) -> torch.Tensor:
        """Return an operand's values, its columns (those summed over) last, float32."""
        data = tensor.handle.data if is_first else tensor.handle.data.T
        stored = torch.from_numpy(np.array(data, order="C"))
        if kind == "e2m1":
            values = e2m1.decode(nibbles.unpack(stored))
        elif kind == "e4m3":
            values = stored.view(torch.uint8).view(torch.float8_e4m3fn).float()
        else:
            raise NotImplementedError(f"dot_scaled of {kind}")
        factors = powers.from_bytes(torch.from_numpy(np.array(scales.handle.data, order="C")))
        return values * factors.repeat_interleave(values.shape[1] // factors.shape[1], dim=1)

    def dot_scaled(
        self: Any,
        first: Any,
        first_scales: Any,
        first_kind: str,
        second: Any,
        second_scales: Any,
        second_kind: str,
        accumulator: Any,
        *options: Any,
    ) -> Any:
        a = operand(first, first_scales, first_kind, is_first=True)
        b = operand(second, second_scales, second_kind, is_first=False)
        product = (a @ b.T).numpy() + accumulator.handle.data
        shape = tl.block_type(tl.float32, list(product.shape))
        return tl.tensor(interpreter.TensorHandle(product, tl.float32), shape)

    # The class: 3.6 makes another instance for each launch.
    type(interpreter.interpreter_semantic).dot_scaled = dot_scaled
