"""Kernels with inline PTX and scaled products: the interpreter is taught both before they run."""

from __future__ import annotations

import ptx_emulator
import scaled_dot
import triton_interpreter

if triton_interpreter.is_interpreted() and triton_interpreter.is_known():
    ptx_emulator.install()
    scaled_dot.install()
