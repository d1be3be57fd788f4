UPDATE meta SET value = 'x' WHERE key = 'mounts'
