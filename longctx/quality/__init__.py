"""Measures what a codec or a level of exactness costs a model, judges that, and remembers it.

`texts` is what is read, `replay` computes it through real blocks, `measure` compares a codec's
distributions with those of `raw`, both by their distance from a float32 pass, `damage` sums that
up, and `gate` decides which codec is used.
`level_measure` and `level_gate` do the same for levels. `verdict` has the limits. `compute_type`
times the types that compute a model equally well, and remembers the faster one.
"""
