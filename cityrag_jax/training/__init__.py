"""Training: losses of the two tasks, optimiser, one step, and its log."""
