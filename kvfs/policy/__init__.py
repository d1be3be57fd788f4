"""Which blocks are hot, and what should move where. Pure: no I/O, no clock."""
