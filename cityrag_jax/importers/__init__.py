"""From people's own panoramas to cities on disk."""
