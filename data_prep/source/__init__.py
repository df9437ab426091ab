"""Where conversations come from: embedded packages, local files, the Hub, the target itself."""

from data_prep.source.base import Source

__all__ = ["Source"]
