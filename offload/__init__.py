"""Where KV bytes live and who leaves."""
