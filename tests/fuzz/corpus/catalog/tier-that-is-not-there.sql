UPDATE replica SET tier = 77
