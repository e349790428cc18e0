"""longctx: upload a long document once, ask it anything for the price of the question."""
