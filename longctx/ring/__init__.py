"""One prompt over many ranks: the sequence is split, the weights are replicated."""
