"""File formats that several engines share, one family (and spelling) a file."""
