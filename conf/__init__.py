"""Configuration: YAML groups, and the little code that checks and builds them."""
