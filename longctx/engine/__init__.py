"""Who runs now: requests in, steps, outputs out."""
