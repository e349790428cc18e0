"""The page at `/`: a browser's way to documents, questions and what the cache holds."""
