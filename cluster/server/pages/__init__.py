"""The small HTTP server for the page and the metrics."""
