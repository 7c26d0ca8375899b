"""The private parts of other libraries that Inlay reads, one file for each library and concern."""
