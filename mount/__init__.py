"""The FUSE edge: pyfuse3 handlers, the daemon's nursery and its services, mountpoints.

It decodes what the kernel asks, calls the store and encodes the answer. It never decides where a
block goes. pyfuse3 is imported here and nowhere else in kvfs.
"""
