"""Triton kernels for GPUs, with the launchers that :mod:`pqk_fast.dispatch` calls; imported as pqk_fast.triton_kernels.

Only :mod:`launch` is importable without Triton. In each file the ``@triton.jit`` kernels come first, then the launchers
with the names and arguments of the operations in :mod:`pqk_fast.dispatch`. A launcher never waits for the GPU.

Under ``TRITON_INTERPRET=1`` (set before the first import of Triton) they take CPU tensors.
"""
