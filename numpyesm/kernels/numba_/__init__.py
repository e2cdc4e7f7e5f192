"""Compiled kernels: the model's steps in Numba, on SIMD instructions that fit the host. Import it only when used."""
