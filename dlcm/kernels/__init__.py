"""Fused Triton kernels, each with a plain twin elsewhere. They need `triton`: import them only where they run."""
