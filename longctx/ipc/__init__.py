"""How processes talk: messages, the sockets that carry them, and lives that end together."""
