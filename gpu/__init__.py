"""The engine-side path from a leased replica to device memory.

It runs in the engine's process, never in the daemon, and never goes through FUSE. CUDA libraries
are imported here and nowhere else in kvfs.
"""
