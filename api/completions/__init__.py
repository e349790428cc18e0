"""Questions: from the body of a chat or a completion to the answer on the wire."""
