UPDATE inode SET kind = 1 WHERE id = 1
