"""Where KV blocks live, and which of them leave a full tier."""
