"""kvfs: a FUSE filesystem whose files are KV-cache blocks, tiered by heat.

This package is the store and imports neither FUSE nor CUDA. `kvfs.mount` is the filesystem and its
daemon, `kvfs.gpu` the path to device memory in an engine's process, `kvfs.tools` the command.
"""

__version__ = "0.1.0"
