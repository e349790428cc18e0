"""Uploaded files: how they are received, tokenized and computed, and what is known of each."""
