"""What a codec costs a model: measured through the cache that serves, judged, remembered.

`texts` is what is read, `replay` computes it through real blocks, `measure` compares a codec's
distributions with those of `raw`, `damage` sums that up, `gate` decides which codec is used.
"""
