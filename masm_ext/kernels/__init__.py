"""Triton kernels and what launches them, imported on demand by ``masm_ext.ops.dispatch``. docs/kernels.md explains
each."""
