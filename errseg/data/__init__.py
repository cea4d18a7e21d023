"""Pictures in and out: reading, labels, overlays, the toy world, and labelled sets: the benchmarks and one's own."""
