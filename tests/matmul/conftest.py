"""Kernels with inline PTX: the interpreter is taught it before the first of them runs."""

from __future__ import annotations

import ptx_emulator
import triton_interpreter

if triton_interpreter.is_interpreted() and triton_interpreter.is_known():
    ptx_emulator.install()
