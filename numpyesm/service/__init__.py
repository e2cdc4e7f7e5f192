"""The HTTP service: the hosted ESM-2 API on your own machine. `numpyesm serve` starts it; extra `serve`."""
