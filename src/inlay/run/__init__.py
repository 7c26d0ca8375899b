"""The run file: keys, flags, YAML, hyperparameters and the sentences about them. No torch."""
