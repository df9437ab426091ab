"""Drafts that need no training, one method a file: what a trained drafter is measured against."""
