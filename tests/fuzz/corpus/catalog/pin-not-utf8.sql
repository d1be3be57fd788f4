UPDATE inode SET pin = CAST(X'ff' AS TEXT) WHERE id = 2
