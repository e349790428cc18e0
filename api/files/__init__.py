"""Files: the path of an upload, and what is known of each document."""
