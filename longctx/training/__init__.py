"""The scripts that made the embedded models; a server needs none of them."""
