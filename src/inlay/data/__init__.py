"""Data: files to validated rows to tokens with masks. Nothing here needs torch to read a file."""
