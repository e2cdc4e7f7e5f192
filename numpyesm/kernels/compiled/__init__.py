"""The compiled backend without its compiler: weights and tables as the kernels read them, and the calls into them.

The kernels themselves are written in `kernels/numba_/`. They arrive here as addresses (`code.Code`), from a library
that was built ahead of time (`library.py`) or from Numba in this process.
"""
