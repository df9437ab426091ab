"""When a draft ends before its full length, one rule a file."""
