"""Acceptance rules, one a file: which drafted path the target keeps, and the token after it."""
