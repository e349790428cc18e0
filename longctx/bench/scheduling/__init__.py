"""Measures and simulates what the scheduler does for those who wait."""
