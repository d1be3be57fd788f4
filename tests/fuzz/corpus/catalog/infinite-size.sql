UPDATE replica SET allocated_bytes = -1e400
