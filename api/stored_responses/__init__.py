"""Answers that clients may ask for again, and go on from."""
