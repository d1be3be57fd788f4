UPDATE inode SET uid = -1, gid = 4294967296
