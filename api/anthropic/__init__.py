"""Anthropic's interface: messages, counts of their tokens, and files in its shape."""
