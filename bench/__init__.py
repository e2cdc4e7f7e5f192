"""The benchmark: numpyesm and its peers in one run, on the same weights (`python -m bench --help`)."""
