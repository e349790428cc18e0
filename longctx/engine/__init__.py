"""Decides what runs now: takes requests, computes steps, returns outputs."""
