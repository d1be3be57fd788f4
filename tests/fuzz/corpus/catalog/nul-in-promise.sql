UPDATE intent SET path = X'6100' WHERE kind = 'unlink'
