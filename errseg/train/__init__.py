"""Training: a plain loop on Hugging Face accelerate, and the recipe of the embedded toy model."""
