"""Noise, velocity, solver and guidance: arrays and functions, no networks."""
