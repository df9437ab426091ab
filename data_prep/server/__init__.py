"""Servers that answer in the target's place: running ones, or one started for the purpose."""
