"""What KV bytes look like: shapes, page layouts and codecs. It imports no other package of ours."""
