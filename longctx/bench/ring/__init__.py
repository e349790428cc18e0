"""What it costs to share a prompt among ranks: measured, in virtual ranks, and projected."""
