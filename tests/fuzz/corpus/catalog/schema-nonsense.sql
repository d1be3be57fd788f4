PRAGMA writable_schema = 1
UPDATE sqlite_master SET sql = 'nonsense' WHERE name = 'ghost'
