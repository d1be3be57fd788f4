UPDATE dirent SET name = X'2E2E' WHERE name = X'746F70'
