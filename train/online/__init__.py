"""Online speculative decoding: a drafter that learns from what was refused while it serves."""
