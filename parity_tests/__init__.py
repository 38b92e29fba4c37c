"""The proof that the layers do what they say, and that Flax and PyTorch agree."""
