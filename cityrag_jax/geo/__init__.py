"""Geography in NumPy float64: arrays in, arrays out; no files but text, no networks."""
