"""Drafter families, one a file."""
