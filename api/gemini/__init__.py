"""Gemini's API, for its clients as they are: content, tokens, files and cached contents."""
