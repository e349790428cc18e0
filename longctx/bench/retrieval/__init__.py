"""Whether what is in a long text is found and used: needles in haystacks, and RULER."""
