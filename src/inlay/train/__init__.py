"""Train an adapter: the run definition, the recipe, TRL's trainer and its callbacks."""
