"""How processes talk: messages, the sockets that carry them, and who ends with whom."""
