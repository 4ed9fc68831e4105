"""The benchmarks, one file each. ``registry.py`` names them."""
