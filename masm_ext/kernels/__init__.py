"""Triton kernels and their launchers, imported by ``masm_ext.ops.dispatch`` at the first call. See docs/kernels.md."""
