"""What happens to blocks by itself: sealing, moving, scrubbing, recovery after a crash."""
