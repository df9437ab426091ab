"""The steps from conversations to shards: tokenize or respond, then capture; and their estimate."""
