UPDATE inode SET ttl_s = 1e400
