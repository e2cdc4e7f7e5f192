"""Look-alikes of other packages on numpyesm's engine."""
