"""Text in, token and feature shards out: what a drafter is trained on, answered by its target."""
