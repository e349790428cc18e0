"""`make demo`, or `python -m longctx.demo`: everything that longctx does, once and for real."""
