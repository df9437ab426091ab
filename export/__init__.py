"""A run becomes a checkpoint of one serving engine, proven equal to the trained drafter."""
