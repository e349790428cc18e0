"""Chats and completions: from the body of a request to its answer."""
