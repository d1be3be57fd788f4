"""A tier and the files on it: where they lie, how they are opened, sealed, copied and counted."""
