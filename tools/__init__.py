"""Scripts for who works on longctx; no part of what is installed."""
