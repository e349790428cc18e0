"""Whether what is in a long text is found: needles in haystacks."""
