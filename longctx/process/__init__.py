"""The engine in a process of its own: asked over a socket, started, watched and ended."""
