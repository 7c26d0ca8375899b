"""The private parts of other libraries that the training loop touches, one file for each."""
