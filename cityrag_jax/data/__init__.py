"""Cities on disk, pairs of drives, clips for training, and video files: host only."""
