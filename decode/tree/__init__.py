"""Draft shapes, one a file: which children each drafted node gets."""
