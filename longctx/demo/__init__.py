"""`make demo`: everything once, for real. `python -m longctx.demo`."""
