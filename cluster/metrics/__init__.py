"""Metrics in the text format of Prometheus. `catalog.py` names them all; docs/metrics.md explains them."""
