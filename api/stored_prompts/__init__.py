"""Schemas, named prompts and retained prompts: what is kept computed for later requests."""
