"""Verbs around finished work: benchmarks, uploads, reports. Run as `python -m scripts.<name>`."""
