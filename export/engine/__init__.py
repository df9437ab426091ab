"""Engines that people serve with, each in an environment of its own."""
