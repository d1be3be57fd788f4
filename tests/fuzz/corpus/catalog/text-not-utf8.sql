UPDATE meta SET value = CAST(X'ff' AS TEXT)
