UPDATE replica SET allocated_bytes = 9223372036854775807
