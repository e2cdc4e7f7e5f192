"""The benchmark: numpyesm and its peers in one run, on the same weights, outputs compared before any time counts.

`python -m bench --help`; `python -m bench.report JSON` writes the table and the plot of a run again.
"""
