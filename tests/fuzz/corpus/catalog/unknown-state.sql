UPDATE inode SET state = 9 WHERE kind = 1
