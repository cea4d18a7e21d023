"""One file per target, each with a `TARGET`."""
