"""The one place that reads configuration."""
