UPDATE intent SET kind = 'rename'
