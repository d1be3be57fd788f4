"""A filesystem that fails when a test says so: a tier for the tests of faults."""
