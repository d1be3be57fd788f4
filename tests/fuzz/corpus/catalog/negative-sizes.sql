UPDATE replica SET allocated_bytes = -5
