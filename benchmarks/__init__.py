"""What measures Baton; raw results are kept in `benchmarks/results/`."""
