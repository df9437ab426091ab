"""Train a drafter: shards in, a run folder out."""
