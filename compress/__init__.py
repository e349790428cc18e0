"""What KV bytes look like: shapes, page layouts and codecs. The lowest rung of the ladder."""
