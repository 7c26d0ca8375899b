"""One run on several processes: who they are, what each runs, how they start."""
