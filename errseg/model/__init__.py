"""The network: configuration, CLIP towers, decoder, checkpoints."""
