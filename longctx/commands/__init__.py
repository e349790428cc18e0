"""One file for each `longctx COMMAND` that is more than a call."""
