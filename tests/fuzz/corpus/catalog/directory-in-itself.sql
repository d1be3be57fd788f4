UPDATE dirent SET parent = inode WHERE inode = (SELECT id FROM inode WHERE kind = 0 AND id != 1 LIMIT 1)
