"""KV blocks of sequences: pools, block tables, prefixes, and their way to lower tiers and back."""
