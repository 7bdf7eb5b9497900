"""IPEX: Intel's extension for PyTorch."""
