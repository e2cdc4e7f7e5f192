"""The library of compiled kernels; numpyesm finds it beside this file."""
