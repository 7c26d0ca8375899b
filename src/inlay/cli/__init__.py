"""The `inlay` command: one short file a verb."""
