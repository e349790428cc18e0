"""Attention over block tables: one primitive, several backends."""
