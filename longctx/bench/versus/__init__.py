"""longctx beside other engines, each in a process of its own: speed, memory, documents."""
