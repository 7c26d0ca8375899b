"""A model from a folder or the hub: configuration, weights, tokenizer, head, storage on load."""
