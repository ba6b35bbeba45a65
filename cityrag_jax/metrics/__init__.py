"""Scores of generated videos against the truth, on the host."""
