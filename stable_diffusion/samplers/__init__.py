"""Samplers beside the pipeline's DDIM: ways from noise to a latent."""
