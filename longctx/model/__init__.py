"""A model folder, checked, loaded and watched: everything that touches transformers' models."""
