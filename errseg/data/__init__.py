"""Pictures in and out: reading, labels, overlays, and the toy world."""
