"""How processes of longctx talk: messages, the sockets that carry them, and lives that end together."""
