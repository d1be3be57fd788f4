UPDATE dirent SET inode = inode + 1000
